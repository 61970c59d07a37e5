"""PyTorch's own low-bit kernels for Intel XPUs (oneDNN): int4 in groups, int8 per channel.

Written from the kernels' sources and tested on stand-ins for them that check what the kernels check (docs/backends.md
tells what has run on hardware). A torch without such a kernel for XPU is asked, not guessed from its version.
Activation order is a permutation of the columns, applied to the weight once and to the activations on every call.

The int4 kernel reads scales in the dtype of the activations: scales of another dtype are rounded to it, and where
that dtype has the smaller range the layer is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from woq import packing
from woq.backends.base import Backend, Target
from woq.weights import PackedWeight, QuantizedWeight, WeightSpec

_INT4 = "aten::_weight_int4pack_mm_with_scales_and_zeros"
_INT8 = "aten::_weight_int8pack_mm"
_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class XpuState:
    """A weight in one kernel's layout, all of it contiguous.

    int4: weight int32 [N, K/8], eight inputs a word, the first in the lowest bits; scales [G, N] in the dtype of the
          activations; zeros int8 [G, N], 0 .. 15; group_size is the kernel's.
    int8: weight int8 [N, K], scales float32 [N], zeros None.
    columns: int64 [K], which activation goes where, or None.
    """

    group_size: int
    weight: Tensor
    scales: Tensor
    zeros: Tensor | None
    columns: Tensor | None


def has_kernel(operator: str) -> bool:
    """Whether this torch has an XPU kernel for `operator` ("aten::name"); needs no XPU."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, "XPU")


def kernel_group(group_size: int) -> int:
    """The group size the int4 kernel is given: the largest power of two up to 256 in `group_size`.

    A group is then several equal kernel groups, which changes no value. The kernel takes multiples of 32.
    """
    return math.gcd(group_size, 256)


class XpuBackend(Backend[XpuState]):
    """See the module's head."""

    name = "xpu"

    def why_not(self, spec: WeightSpec, target: Target) -> str | None:
        if target.dtype not in _DTYPES:
            return f"torch's XPU kernels take bfloat16 and float16, not {target.dtype}"
        if spec.bits == 4:
            if kernel_group(spec.group_size) < 32 or spec.in_features % spec.group_size:
                return f"torch's int4 kernel wants groups that are a multiple of 32 and divide in_features, not {spec.group_size}"
            if target.dtype == torch.float16 and spec.scale_dtype != torch.float16:
                return f"torch's int4 kernel would round {spec.scale_dtype} scales to float16, whose range is smaller"
        elif spec.bits == 8:
            if not spec.sym or spec.group_size != spec.in_features:
                return "torch's int8 kernel is symmetric and per channel only"
        else:
            return f"torch has XPU kernels for 4 and 8 bits, not {spec.bits}"
        operator = _INT4 if spec.bits == 4 else _INT8
        return None if has_kernel(operator) else f"torch {torch.__version__} has no XPU kernel for {operator}"

    def prepare(self, packed: PackedWeight, target: Target) -> XpuState:
        return arrange(packed.to(target.device).unpack(), target.dtype)

    def apply(self, x: Tensor, state: XpuState) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        flat = flat.contiguous() if state.columns is None else flat[:, state.columns]
        if not len(flat):  # oneDNN is not asked about empty products
            return x.new_empty(*x.shape[:-1], state.weight.shape[0])
        y: Tensor
        if state.zeros is None:
            y = torch.ops.aten._weight_int8pack_mm(flat, state.weight, state.scales)
        else:
            y = torch.ops.aten._weight_int4pack_mm_with_scales_and_zeros(
                flat, state.weight, state.group_size, state.scales, state.zeros
            )
        return y.reshape(*x.shape[:-1], state.weight.shape[0])


def arrange(weight: QuantizedWeight, dtype: torch.dtype) -> XpuState:
    """The kernels' form of `weight` for activations of `dtype`, on whatever device it is."""
    spec, codes, columns = weight.spec, weight.codes, None
    if weight.g_idx is not None:
        columns = torch.argsort(weight.groups_of_inputs(), stable=True)
        codes = codes[:, columns]
    if spec.bits == 8:
        signed = (codes.to(torch.int16) - 128).to(torch.int8)
        scales = weight.scales.float().flatten()
        return XpuState(spec.in_features, row_major(signed), scales, None, columns)
    group = kernel_group(spec.group_size)
    scales, zeros = (
        row_major(table.repeat_interleave(spec.group_size // group, dim=1).t())
        for table in (weight.scales.to(dtype), weight.zeros.to(torch.int8))
    )
    return XpuState(group, row_major(packing.pack_dense(codes.t(), 4).t()), scales, zeros, columns)


def row_major(matrix: Tensor) -> Tensor:
    """A copy with strides (columns, 1), also where one row or one column lets `contiguous` keep others."""
    return matrix.clone(memory_format=torch.contiguous_format)
