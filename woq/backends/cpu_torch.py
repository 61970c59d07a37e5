"""PyTorch's own int4 and int8 CPU kernels, where they are right and faster than the reference.

What the kernels do not check themselves is checked here (formats.md sections 3.1 and 3.2): shapes of the scale
table, alignment, dtypes. Outside bfloat16 they run scalar code ten times slower than a plain matrix product, so
other dtypes are refused. Activation order is a permutation of the columns, applied to the weight once and to the
activations on every call.

The int4 kernel computes `(q - 8) * s + (8 - z) * s` with both terms in bfloat16: asymmetric weights move by up to
0.03 of a step, on top of the rounding that bfloat16 itself brings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from woq.backends.base import Backend, Target
from woq.weights import DataType, PackedWeight, QuantizedWeight, WeightSpec

_GROUPS = (256, 128, 64, 32)  # what the int4 kernel accepts
_ROWS = 16  # out_features come in multiples of this
# From here on dequantizing and one bfloat16 product is faster: 2048 x 2048, one thread with AMX, 512 rows: 94 ms against 47.
_MANY_ROWS = 256
_ALIGNMENT = 64  # bytes; the int8 kernel loads whole cache lines without asking


@dataclass(frozen=True, eq=False)
class TorchState:
    """A weight in one kernel's layout.

    int4: weight uint8 [N', K/2] in an order that depends on the CPU, scales_and_zeros bf16 [G, N', 2], N' = N padded.
    int8: weight int8 [N, K], scales_and_zeros bf16 [N].
    columns: int64 [K], which activation goes where, or None. packed: the checkpoint's form, for many rows at once.
    """

    bits: int
    out_features: int
    group_size: int
    weight: Tensor
    scales_and_zeros: Tensor
    columns: Tensor | None
    packed: PackedWeight


def _kernel_group(spec: WeightSpec) -> int | None:
    """The largest accepted group size that divides the layer's: a group is then several equal kernel groups."""
    if spec.in_features % spec.group_size:
        return None
    return next((g for g in _GROUPS if spec.group_size % g == 0), None)


class TorchBackend(Backend[TorchState]):
    """See the module's head."""

    name = "torch"
    data_types: ClassVar[tuple[DataType, ...]] = (
        "int",
        "int_float_zeros",
    )  # zero points enter as (8 - z) * s

    def why_not(self, spec: WeightSpec, target: Target) -> str | None:
        if target.dtype != torch.bfloat16:
            return f"torch's low-bit CPU kernels are vectorised for bfloat16 only, not {target.dtype}"
        if spec.bits == 4:
            if _kernel_group(spec) is None:
                return f"torch's int4 kernel wants groups that are a multiple of 32 and divide in_features, not {spec.group_size}"
            return None
        if spec.bits == 8:
            if not spec.sym or spec.group_size != spec.in_features:
                return "torch's int8 kernel is symmetric and per channel only"
            if spec.in_features % 16:
                return f"torch's int8 kernel reads past rows whose length is not a multiple of 16, and this is {spec.in_features}"
            return None
        return f"torch has CPU kernels for 4 and 8 bits, not {spec.bits}"

    def prepare(self, packed: PackedWeight, target: Target) -> TorchState:
        quantized = packed.to("cpu").unpack()
        columns = None
        if quantized.g_idx is not None:
            columns = torch.argsort(quantized.groups_of_inputs(), stable=True)
        codes = quantized.codes if columns is None else quantized.codes[:, columns]
        if packed.spec.bits == 8:
            weight = (codes.to(torch.int16) - 128).to(torch.int8).contiguous()
            scales = quantized.scales.to(torch.bfloat16).flatten()
            return TorchState(
                8, packed.spec.out_features, packed.spec.group_size, weight, scales, columns, packed
            )
        return self._prepare_int4(codes, quantized, columns, packed)

    def _prepare_int4(
        self, codes: Tensor, quantized: QuantizedWeight, columns: Tensor | None, packed: PackedWeight
    ) -> TorchState:
        spec = quantized.spec
        group = _kernel_group(spec)
        assert group is not None  # why_not refused the others
        pad = -spec.out_features % _ROWS
        weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            F.pad(codes.to(torch.int32), (0, 0, 0, pad)), 1
        )
        scales = quantized.scales.float()
        both = torch.stack([scales, (8 - quantized.zeros.float()) * scales], dim=-1)  # [N, G, 2]
        both = both.repeat_interleave(spec.group_size // group, dim=1)
        both = F.pad(both, (0, 0, 0, 0, 0, pad)).transpose(0, 1).to(torch.bfloat16).contiguous()
        return TorchState(4, spec.out_features, group, weight, both, columns, packed)

    def apply(self, x: Tensor, state: TorchState) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if flat.shape[0] > _MANY_ROWS:
            return F.linear(x, state.packed.unpack().dequantize(x.dtype))
        flat = flat.contiguous() if state.columns is None else flat[:, state.columns]
        if state.bits == 4:
            y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
                flat, state.weight, state.group_size, state.scales_and_zeros
            )
            y = y[:, : state.out_features]
        else:
            if flat.data_ptr() % _ALIGNMENT:
                flat = flat.clone()
            y = torch.ops.aten._weight_int8pack_mm(flat, state.weight, state.scales_and_zeros)
        return y.reshape(*x.shape[:-1], state.out_features)
