"""Rows of codes in int32 words, in the two packings that other libraries use; which one, the number of words tells."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from woq import packing
from woq.interop.base import Layer

Unpack = Callable[[Tensor, int, int], Tensor]
_WORD = 32


def row_words(length: int, bits: int) -> int:
    """int32 words of `length` codes, dense and without padding to a block."""
    return -(-length * bits // _WORD)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """uint8 [R, L] -> int32 [R, ceil(L*b/32)], dense: one little-endian bit string a row."""
    return packing.pack_dense(codes.t(), bits)[: row_words(codes.shape[1], bits)].t().contiguous()


def unpack_rows(words: Tensor, bits: int, length: int) -> Tensor:
    """Inverse of `pack_rows`; takes padding to whole blocks, and floor(32/b) codes a word, where the number of words says
    so. Raises ValueError where it is that of none."""
    got, block = words.shape[1], packing.dense_words(length, bits)
    if got in (row_words(length, bits), block):
        padded = torch.nn.functional.pad(words, (0, block - got))
        return packing.unpack_dense(padded.t(), bits, length).t()
    return _floor(words, bits, length)


def unpack_rows_floor(words: Tensor, bits: int, length: int) -> Tensor:
    """As `unpack_rows`, for writers that put floor(32/b) codes in a word: theirs where the number of words fits both."""
    if words.shape[1] == packing.floor_words(length, bits, torch.int32):
        return _floor(words, bits, length)
    return unpack_rows(words, bits, length)


def _floor(words: Tensor, bits: int, length: int) -> Tensor:
    due = packing.floor_words(length, bits, torch.int32)
    if words.shape[1] != due:
        raise ValueError(
            f"{words.shape[1]} words for {length} codes, expected {row_words(length, bits)} dense, "
            f"or {due} with {_WORD // bits} codes a word"
        )
    return packing.unpack_floor(words, bits, length)


def unpacked(
    layer: Layer, part: str, bits: int, shape: tuple[int, int], dim: int, unpack: Unpack = unpack_rows
) -> Tensor:
    """uint8 `shape`: tensor `part`, which is packed along `dim`. Raises CheckpointError where its size is another."""
    words = layer.tensor(part, torch.int32)
    along = words.t() if dim == 0 and words.dim() == 2 else words
    if words.dim() != 2 or along.shape[0] != shape[1 - dim]:
        raise layer.refuse(
            f"{part} is {list(words.shape)}, expected 2 dimensions, {shape[1 - dim]} along dimension {1 - dim}"
        )
    try:
        codes = unpack(along, bits, shape[dim])
    except ValueError as error:
        raise layer.refuse(f"{part} is {list(words.shape)}: {error}") from error
    return codes.t() if dim == 0 else codes
