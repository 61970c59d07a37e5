"""A quantized weight as ONNX Runtime's `MatMulNBits` stores it, and the linear that becomes such a node.

    Y = A @ dequantize(B).T        B uint8 [N, blocks, block * bits / 8], first code in the lowest bits
                                   scales float [N * blocks]; zero points uint8 [N, ceil(blocks * bits / 8)], or none
                                   where every one is 2^(bits-1)

The CPU kernels know 2, 4 and 8 bits and blocks of 16 to 256, powers of two. Nothing is lost in getting there: 3 bits are
stored in 4 and 5 to 7 in 8 (symmetric codes are moved so that their zero point is the default), a group is cut into
equal blocks, and act-order becomes an order of the input features (the operator's own g_idx is wrong beside packed
zero points in ONNX Runtime 1.31).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from woq.errors import CheckpointError
from woq.weights import QuantizedWeight

BLOCKS = (256, 128, 64, 32, 16)
DOMAIN = "com.microsoft"
_STORED = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}


@dataclass(frozen=True)
class NBits:
    """What the operator takes. order: int64 [K], the input features in the order of B's columns, or None."""

    bits: int
    block: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None


def why_not(weight: QuantizedWeight) -> str | None:
    """None where `MatMulNBits` computes this weight, else the condition that it fails."""
    spec = weight.spec
    if spec.data_type != "int":
        return f"data type {spec.data_type!r}: MatMulNBits takes integer codes and zero points"
    if _block(spec.group_size, spec.in_features) is None:
        return f"group size {spec.group_size}: MatMulNBits takes multiples of 16"
    return None


def _block(group_size: int, in_features: int) -> int | None:
    """The largest block that cuts a group into equal parts; a single group may end in a part of one."""
    if group_size >= in_features:
        return next((b for b in BLOCKS if b <= max(in_features, 16)), None)
    return next((b for b in BLOCKS if group_size % b == 0), None)


def to_nbits(weight: QuantizedWeight) -> NBits:
    """`weight` for the operator; `why_not` must have no objection."""
    spec = weight.spec
    bits, block = _STORED[spec.bits], _block(spec.group_size, spec.in_features)
    assert block is not None
    shift = (1 << bits - 1) - (1 << spec.bits - 1) if spec.sym else 0
    codes, zeros, order = weight.codes + shift, weight.zeros + shift, None
    if weight.g_idx is not None:
        order = torch.argsort(weight.groups_of_inputs(), stable=True)
        codes = codes[:, order]
    blocks = -(-spec.in_features // block)
    group = torch.arange(blocks) * block // spec.group_size
    codes = F.pad(codes, (0, blocks * block - spec.in_features))
    return NBits(
        bits,
        block,
        pack_bytes(codes.view(spec.out_features, blocks, block), bits),
        weight.scales[:, group].contiguous(),
        None if spec.sym else pack_bytes(zeros[:, group], bits),
        order,
    )


def pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., n] of codes below 2^bits as uint8 [..., ceil(n * bits / 8)], the first in the lowest bits."""
    each = 8 // bits
    padded = F.pad(codes, (0, -codes.shape[-1] % each))
    parts = padded.unflatten(-1, (-1, each)) << (torch.arange(each, dtype=torch.uint8) * bits)
    packed: Tensor = parts.sum(-1, dtype=torch.uint8)
    return packed


def unpack_bytes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_bytes`: uint8 [..., count]."""
    shifts = torch.arange(8 // bits, dtype=torch.uint8) * bits
    codes = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :count]


def dequantize(stored: NBits, in_features: int) -> Tensor:
    """The weight [N, K] that the operator multiplies with, its columns in the order they are stored in."""
    n, blocks = stored.codes.shape[:2]
    codes = unpack_bytes(stored.codes, stored.bits, stored.block).float()
    zeros = torch.full((n, blocks), 1 << stored.bits - 1)
    if stored.zeros is not None:
        zeros = unpack_bytes(stored.zeros, stored.bits, blocks)
    weight: Tensor = (codes - zeros.float().unsqueeze(-1)) * stored.scales.float().unsqueeze(-1)
    return weight.view(n, -1)[:, :in_features]


class NBitsLinear(nn.Module):
    """A `QuantLinear` in the exporter's eyes. Scales stay in the dtype that they are stored in; the runtime casts once."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, name: str) -> None:
        """Raises CheckpointError, naming the layer, where the operator cannot hold the weight."""
        super().__init__()
        reason = why_not(weight)
        if reason is not None:
            raise CheckpointError(f"layer {name!r} cannot be exported: {reason}")
        made = to_nbits(weight)
        self.attributes: dict[str, Any] = {
            "K": weight.spec.in_features, "N": weight.spec.out_features, "bits": made.bits, "block_size": made.block,
        }  # fmt: skip
        self.register_buffer("codes", made.codes)
        self.register_buffer("scales", made.scales.flatten())
        self.register_buffer("zeros", None if made.zeros is None else made.zeros.flatten())
        self.register_buffer("order", made.order)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], as a node of the graph: there is nothing to compute here."""
        if self.order is not None:
            x = x.index_select(-1, self.order)
        inputs = (x, self.codes, self.scales.to(x.dtype), *(() if self.zeros is None else (self.zeros,)))
        y: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::MatMulNBits",
            inputs,
            self.attributes,
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.attributes["N"]),
            version=1,
        )
        return y if self.bias is None else y + self.bias.to(y.dtype)
