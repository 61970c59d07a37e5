"""How the Triton kernels want a weight: 16-bit words that a shift and a mask turn into operands of a matrix product.

A code is taken apart into *planes* of 4, 2 and 1 bits (3 = 2 + 1, 8 = 4 + 4), so that no code straddles a word. A word
of a plane of w bits holds 16 / w codes of one output, of inputs that are 32 apart: field i of the 32 words of a *tile* row
is a run of 32 neighbouring inputs. So one tile [16 outputs, 32 words], loaded once, gives 16 / w operands [16, 32] of
a product, each by the same shift of every word; nothing is shuffled, and a pair of neighbouring words is a pair of
neighbouring inputs, which is how matrix units take 16-bit operands. A *block* is as many inputs as fill a whole tile of
the narrowest plane; its tiles lie one after the other, 1 KiB each, then come the next blocks of the same 16 outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from woq.weights import QuantizedWeight

WORD = 16
RUN = 32  # neighbouring inputs in one field of a tile's row: the smallest group that the kernels scale by themselves
TILE_N = 16
WIDTHS = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (4, 4)}


def block_of(bits: int) -> int:
    """Inputs in a block: 128 for 4 and 8 bits, 256 for 2 and 6, 512 for 3, 5 and 7."""
    return RUN * WORD // min(WIDTHS[bits])


@dataclass(frozen=True, eq=False)
class TritonState:
    """A weight as the kernels read it.

    words: int16 [ceil(N / 16), ceil(K / block), tiles, 16, 32], tiles = bits * block / 512; padding has code 0
    scales: [G, N]; zeros: uint8 [G, N], or None when symmetric
    order: int32 [K], which column of x meets which column of the weight (act-order), or None
    group_size: inputs that share a scale; any number
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    in_features: int
    bits: int
    group_size: int


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [N, K] -> words, see `TritonState`."""
    n, k = codes.shape
    block = block_of(bits)
    padded = torch.nn.functional.pad(codes, (0, -k % block, 0, -n % TILE_N))
    by_run = padded.view(-1, TILE_N, padded.shape[1] // block, block // RUN, RUN).permute(0, 2, 3, 1, 4)
    tiles, taken = [], 0
    for width in WIDTHS[bits]:
        fields = ((by_run >> taken) & ((1 << width) - 1)).unflatten(2, (-1, WORD // width))
        words = torch.zeros_like(fields[:, :, :, 0], dtype=torch.int16)
        for i in range(WORD // width):
            words |= fields[:, :, :, i].to(torch.int16) << (width * i)
        tiles.append(words)
        taken += width
    return torch.cat(tiles, dim=2).contiguous()


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_words`: words -> codes int16 [N', K'], N' and K' with the padding."""
    runs, codes, tile = block_of(bits) // RUN, None, 0
    taken = 0
    for width in WIDTHS[bits]:
        count = runs * width // WORD
        fields = [
            (words[:, :, tile : tile + count] >> (width * i)) & ((1 << width) - 1)
            for i in range(WORD // width)
        ]
        plane = torch.stack(fields, dim=3).flatten(2, 3) << taken  # [N/16, blocks, runs, 16, 32]
        codes = plane if codes is None else codes | plane
        tile, taken = tile + count, taken + width
    assert codes is not None
    return codes.permute(0, 3, 1, 2, 4).reshape(words.shape[0] * TILE_N, -1)


def arrange(weight: QuantizedWeight) -> TritonState:
    """The kernels' form of `weight`, made where `weight` is.

    With act-order columns are sorted by group; groups that g_idx makes uneven get one scale an input.
    """
    spec = weight.spec
    codes, scales, zeros, order, group_size = weight.codes, weight.scales, weight.zeros, None, spec.group_size
    if weight.g_idx is not None:
        groups = weight.g_idx.to(torch.int64)
        columns = torch.argsort(groups, stable=True)
        codes, order = codes[:, columns], columns.to(torch.int32)
        regular = torch.arange(spec.in_features, device=groups.device) // spec.group_size
        if not torch.equal(groups[columns], regular):
            scales, zeros, group_size = scales[:, groups[columns]], zeros[:, groups[columns]], 1
    if group_size >= spec.in_features:  # one group: it may as well cover the padding
        block = block_of(spec.bits)
        group_size = -(-spec.in_features // block) * block
    return TritonState(
        words=pack_words(codes, spec.bits),
        scales=scales.t().contiguous(),
        zeros=None if spec.sym else zeros.t().contiguous(),
        order=order,
        in_features=spec.in_features,
        bits=spec.bits,
        group_size=group_size,
    )


def fits_kernels(bits: int, group_size: int) -> bool:
    """Whether the product's kernels can scale by group: whole runs, that divide a block or are whole blocks."""
    block = block_of(bits)
    return group_size % block == 0 or (group_size % RUN == 0 and block % group_size == 0)
