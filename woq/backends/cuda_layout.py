"""Codes and scales in the order in which the CUDA kernels' threads hold them (csrc/cuda/dequant.cuh reads it).

A block is 64 outputs x 64 inputs, stored as the A operands of `mma.m16n8k16`: each thread's load *is* its fragment, and
nothing is shuffled at run time. The order is the same for every bit width, activation dtype and launch, so tuning a
kernel never changes what `prepare` made. All of it is a permutation and a handful of byte operations in torch: it runs
wherever the tensors are, in milliseconds a layer on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64
_CHUNK_CODES = 1 << 25  # bounds the temporary memory of a large layer: a few bytes a code


def _pack_fields(codes: Tensor, width: int) -> Tensor:
    """uint8 [..., 16 pairs, 2] -> uint8 [..., 4 * width]: words whose halves hold a pair's two codes at the same bit."""
    per_half = 16 // width
    fields = codes.reshape(*codes.shape[:-2], 16 // per_half, per_half, 2).transpose(-1, -2)
    by_byte = fields.reshape(*codes.shape[:-2], 4 * width, 8 // width)
    packed = by_byte[..., 0].clone()
    for i in range(1, 8 // width):
        packed |= by_byte[..., i] << (i * width)
    return packed


def _pack_threes(codes: Tensor) -> Tensor:
    """uint8 [R, C, 4, 32, 16 pairs, 2] -> uint8 [R, C, 1536]: a byte has two codes, and two of the bits of a third."""
    pairs = codes.unflatten(-2, (2, 2, 2, 2)).movedim(-4, -1)  # [..., 32 inputs, right, upper, e, step % 2]
    (first, second), (third, rest) = [half.unbind(-4) for half in pairs.unbind(-5)]
    low, high = rest.unbind(-3)  # rows of the upper and of the lower half of a tile
    tops = [low & 3, high & 3, low >> 2 | (high >> 2) << 1]
    words = [
        w[..., 0, :, :] | w[..., 1, :, :] << 3 | top << 6
        for w, top in zip((first, second, third), tops, strict=True)
    ]
    planes = [torch.stack(words[:2], dim=-3), words[2]]
    return torch.cat([plane.flatten(2) for plane in planes], dim=-1)


def _pack_blocks(codes: Tensor, bits: int) -> Tensor:
    """uint8 [64 R, 64 C] -> uint8 [R, C, 512 * bits]."""
    rows, columns = codes.shape[0] // BLOCK, codes.shape[1] // BLOCK
    # row = 16 tile + 8 upper + r; input = 16 step + 8 right + 2 c + e; lane = 4 r + c; register = 2 right + upper
    split = codes.view(rows, 4, 2, 8, columns, 4, 2, 4, 2)
    fragments = split.permute(0, 4, 1, 3, 7, 5, 6, 2, 8).reshape(rows, columns, 4, 32, 16, 2)
    if bits == 3:
        return _pack_threes(fragments).reshape(rows, columns, -1)
    packed = _pack_fields(fragments, bits)
    if bits == 8:  # [tile][half][lane]: a thread reads 16 bytes at a time
        packed = packed.view(rows, columns, 4, 32, 2, 16).transpose(3, 4)
    return packed.reshape(rows, columns, -1)


def pack_weight(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [N, K] -> int32 [ceil(N/64), ceil(K/64), 128 * bits], zero codes in the padding."""
    n, k = codes.shape
    blocks = (-(-n // BLOCK), -(-k // BLOCK))
    packed = torch.empty(*blocks, 512 * bits, dtype=torch.uint8, device=codes.device)
    step = max(1, _CHUNK_CODES // (BLOCK * BLOCK * blocks[1]))
    for first in range(0, blocks[0], step):
        part = codes[first * BLOCK : (first + step) * BLOCK]
        rows = min(step, blocks[0] - first)
        part = torch.nn.functional.pad(part, (0, blocks[1] * BLOCK - k, 0, rows * BLOCK - part.shape[0]))
        packed[first : first + rows] = _pack_blocks(part, bits)
    return packed.view(torch.int32)


def pack_scales(scales: Tensor, zeros: Tensor | None) -> Tensor:
    """Scales 16-bit float [N, G], zeros uint8 [N, G] or None -> uint8 [ceil(N/64), G, 128 or 192].

    A group's 64 scales, then its 64 zero points, both ordered so that a thread's eight rows are neighbours.
    """
    n, groups = scales.shape
    rows = -(-n // BLOCK)

    def by_lane(values: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(values, (0, 0, 0, rows * BLOCK - n))
        return padded.view(rows, 4, 2, 8, groups).permute(0, 4, 3, 1, 2).reshape(rows, groups, BLOCK)

    packed = by_lane(scales).contiguous().view(torch.uint8)
    return packed if zeros is None else torch.cat([packed, by_lane(zeros)], dim=-1)
