"""GGUF's simplest blocks, Q4_0, Q4_1 and Q8_0: 32 weights in a row with a float16 scale (`formats.md` section 8).

    Q4_0   d, 16 bytes: weight j low, weight j + 16 high     w = d * (q - 8)      symmetric 4 bit
    Q4_1   d, m, 16 bytes in the same order                  w = d * q + m        asymmetric 4 bit, m = -d * zero
    Q8_0   d, 32 signed bytes                                w = d * q            symmetric 8 bit

A group of 64 or more weights repeats its scale in each of its blocks. Q4_0 and Q8_0 lose nothing; in Q4_1, m is
rounded to float16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from woq.interop.base import first_refusal
from woq.weights import QuantizedWeight

BLOCK = 32


def block_type(weight: QuantizedWeight) -> str:
    """The name of the block that holds this weight; asked only where `why_not` has no objection."""
    if weight.spec.bits == 8:
        return "Q8_0"
    return "Q4_0" if bool((weight.zeros == 8).all()) else "Q4_1"


def why_not(weight: QuantizedWeight) -> str | None:
    """None where GGUF blocks hold this weight, else the condition that it fails."""
    spec, scales = weight.spec, weight.scales
    k, size = spec.in_features, spec.group_size
    symmetric = bool((weight.zeros == 1 << (spec.bits - 1)).all())
    return first_refusal(
        (spec.data_type == "int", f"the data type {spec.data_type!r}: only whole numbers can be told"),
        (spec.bits in (4, 8), f"{spec.bits} bits: Q4_0, Q4_1 and Q8_0 have 4 and 8"),
        (spec.bits == 4 or symmetric, "8 bits with zero points: Q8_0 has none"),
        (not spec.desc_act, "activation order (g_idx): GGUF has no place for it"),
        (k % BLOCK == 0, f"in_features {k} is no multiple of {BLOCK}"),
        (size % BLOCK == 0, f"group_size {size} is no multiple of {BLOCK}"),
        (k % size == 0, f"group_size {size} does not divide in_features {k}: the last group is short"),
        (
            torch.equal(scales.to(torch.float16).to(scales.dtype), scales),
            f"scales are {scales.dtype}, and float16, all that GGUF has, changes them",
        ),
    )


def to_blocks(weight: QuantizedWeight) -> Tensor:
    """uint8 [N, K/32 * bytes of a block]."""
    spec = weight.spec
    rows, blocks = spec.out_features, spec.in_features // BLOCK
    codes = weight.codes.view(rows, blocks, BLOCK)
    scales = weight.scales.to(torch.float16).repeat_interleave(spec.group_size // BLOCK, dim=1)
    head = [_bytes(scales)]
    kind = block_type(weight)
    if kind == "Q8_0":
        body = codes ^ 0x80  # unsigned with zero point 128 -> two's complement
    else:
        body = codes[..., : BLOCK // 2] | (codes[..., BLOCK // 2 :] << 4)
        if kind == "Q4_1":
            least = -(weight.scales.float() * weight.zeros.float()).to(torch.float16)
            head.append(_bytes(least.repeat_interleave(spec.group_size // BLOCK, dim=1)))
    return torch.cat([*head, body], dim=-1).reshape(rows, -1).contiguous()


def _bytes(halves: Tensor) -> Tensor:
    """float16 [N, B] -> uint8 [N, B, 2]."""
    return halves.contiguous().view(torch.uint8).view(*halves.shape, 2)
