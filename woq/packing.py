"""Unsigned b-bit codes to machine words and back: two packings, each a tested inverse pair.

*Dense* (the GPTQ layout, `formats.md` section 4.1): the codes of a column form one little-endian bit string, code i
in bits [i*b, i*b+b), cut into 32-bit words. Every 32 codes fill exactly b words, so 3, 5, 6 and 7 bits waste
nothing; a code may straddle two words. Packed along dimension 0.

*Floor* (neural-compressor's plain layout, section 1.5): floor(word/b) codes a word, the first in the lowest bits, the
top bits unused. Words of 8, 16, 32 or 64 bits. Packed along the last dimension.

Both pad a ragged end with zero codes; the unpacker is told the true length. Nothing here knows of scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = {torch.int8: 8, torch.int16: 16, torch.int32: 32, torch.int64: 64}
BLOCK = 32  # dense: the shortest run of codes that ends on a word boundary for every bit width


def dense_words(length: int, bits: int) -> int:
    """Number of int32 words that hold `length` codes of `bits` bits, padded to a whole block of 32 codes."""
    return -(-length // BLOCK) * bits


def pack_dense(codes: Tensor, bits: int) -> Tensor:
    """Pack `codes` (any integer dtype, [L, C], values 0..2^bits-1) along dimension 0.

    Returns int32 [ceil(L/32)*bits, C]. Bits above `bits` in a code are dropped, so a code out of range cannot
    spill into its neighbours.
    """
    length, columns = codes.shape
    blocks = -(-length // BLOCK)
    if length % BLOCK:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, blocks * BLOCK - length))
    by_block = codes.reshape(blocks, BLOCK, columns)
    words = torch.zeros(blocks, bits, columns, dtype=torch.int32, device=codes.device)
    for i in range(BLOCK):
        word, shift = divmod(i * bits, 32)
        code = by_block[:, i].to(torch.int32).bitwise_and_((1 << bits) - 1)
        words[:, word] |= code << shift
        if shift + bits > 32:  # the code's high bits open the next word
            words[:, word + 1] |= code >> (32 - shift)
    return words.reshape(blocks * bits, columns)


def unpack_dense(words: Tensor, bits: int, length: int) -> Tensor:
    """Inverse of `pack_dense`: int32 [ceil(length/32)*bits, C] -> uint8 [length, C]."""
    blocks, columns = words.shape[0] // bits, words.shape[1]
    by_block = words.reshape(blocks, bits, columns)
    mask = (1 << bits) - 1
    codes = torch.empty(blocks, BLOCK, columns, dtype=torch.uint8, device=words.device)
    for i in range(BLOCK):
        word, shift = divmod(i * bits, 32)
        # int32 shifts copy the sign bit down: mask before any bit above the code's own can matter.
        code = by_block[:, word] >> shift
        if shift + bits > 32:
            low = (1 << (32 - shift)) - 1
            code = (code & low) | (by_block[:, word + 1] << (32 - shift))
        codes[:, i] = code & mask
    return codes.reshape(blocks * BLOCK, columns)[:length]


def floor_words(length: int, bits: int, word: torch.dtype) -> int:
    """Number of words of dtype `word` that hold `length` codes, floor(word bits / bits) a word."""
    return -(-length // (WORD_BITS[word] // bits))


def pack_floor(codes: Tensor, bits: int, word: torch.dtype) -> Tensor:
    """Pack `codes` ([R, L], values 0..2^bits-1) along the last dimension into words of dtype `word`.

    Returns [R, ceil(L/n)] with n = floor(word bits / bits).
    """
    rows, length = codes.shape
    per_word = WORD_BITS[word] // bits
    count = floor_words(length, bits, word)
    codes = torch.nn.functional.pad(codes, (0, count * per_word - length)).reshape(rows, count, per_word)
    wide = torch.zeros(rows, count, dtype=torch.int64, device=codes.device)
    for e in range(per_word):
        wide |= (codes[:, :, e].to(torch.int64) & ((1 << bits) - 1)) << (bits * e)
    return wide.to(word)  # keeps the low bits: two's complement wraps


def unpack_floor(words: Tensor, bits: int, length: int) -> Tensor:
    """Inverse of `pack_floor`: [R, W] -> uint8 [R, length]."""
    per_word = WORD_BITS[words.dtype] // bits
    wide = words.to(torch.int64)
    mask = (1 << bits) - 1
    codes = torch.stack([((wide >> (bits * e)) & mask).to(torch.uint8) for e in range(per_word)], dim=-1)
    return codes.reshape(words.shape[0], -1)[:, :length]
