"""Intel Extension for PyTorch's int4 kernels, for those who still run that stack. Never chosen by itself.

IPEX was archived after 2.8, works under torch 2.8 alone, and without AMX is some two hundred times slower than torch's
own kernels; so it is used where `backend="ipex"` asks for it, and imported then. 4 bits only.

What its kernels do not check is refused here. On the CPU (tried with 2.8.0): groups that are no power of two read past
the weight and give garbage, a K that is no multiple of 4 ends the process, and N = 1 loses a dimension. On an XPU (from
its source, never run): asymmetric GPTQ weights are computed with zero point 8.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from woq import packing
from woq.backends.base import Backend, Target
from woq.backends.xpu import row_major
from woq.weights import PackedWeight, QuantizedWeight, WeightSpec

_PACKAGE = "intel-extension-for-pytorch"


@dataclass(frozen=True, eq=False)
class CpuState:
    """`handle` points into `context`, a TorchScript object that holds the weight in oneDNN's blocks."""

    context: Any
    handle: Tensor


@dataclass(frozen=True, eq=False)
class XpuState:
    """oneDNN's layout.

    weight int32 [K/8, N] with strides (1, K/8): eight inputs a word, the first in the lowest bits; scales float16
    [G, N]; zeros int8 [1], the one zero point; columns int64 [K], which activation goes where, or None.
    """

    group_size: int
    weight: Tensor
    scales: Tensor
    zeros: Tensor
    columns: Tensor | None


def missing() -> str | None:
    """None where IPEX can be imported; under another torch than its own its import fails without saying why."""
    try:
        version = metadata.version(_PACKAGE)
    except metadata.PackageNotFoundError:
        return f"{_PACKAGE} is not installed; `pip install woq[ipex]` in an environment with torch 2.8"
    if version.split(".")[:2] != torch.__version__.split(".")[:2]:
        return f"{_PACKAGE} {version} does not run under torch {torch.__version__}"
    return None


class IpexBackend(Backend[CpuState | XpuState]):
    """See the module's head."""

    name = "ipex"

    def why_not(self, spec: WeightSpec, target: Target) -> str | None:
        return _why_not_weight(spec, target) or missing()

    def prepare(self, packed: PackedWeight, target: Target) -> CpuState | XpuState:
        importlib.import_module(_PACKAGE.replace("-", "_"))  # registers torch.ops.torch_ipex
        quantized = packed.to(target.device).unpack()
        return arrange_xpu(quantized) if target.device.type == "xpu" else _prepack(quantized)

    def apply(self, x: Tensor, state: CpuState | XpuState) -> Tensor:
        if isinstance(state, CpuState):
            y: Tensor = torch.ops.torch_ipex.ipex_woq_linear(x.contiguous(), state.handle)
            return y
        flat = x.reshape(-1, x.shape[-1])
        flat = flat.contiguous() if state.columns is None else flat[:, state.columns]
        xpu: Any = torch.xpu  # IPEX adds the choice of engine to it; the layouts of the two engines differ
        with xpu.compute_eng(xpu.XPUComputeEng.ONEDNN):
            y = torch.ops.torch_ipex.mm_int4(flat, state.weight, state.scales, state.zeros, state.group_size)
        return y.reshape(*x.shape[:-1], state.weight.shape[1])


def _why_not_weight(spec: WeightSpec, target: Target) -> str | None:
    """What holds wherever IPEX is installed."""
    if spec.bits != 4:
        return f"IPEX's GPTQ kernels are for 4 bits, not {spec.bits}"
    power_of_two = spec.group_size & (spec.group_size - 1) == 0
    if target.device.type == "xpu":
        if target.dtype != torch.float16 or spec.scale_dtype != torch.float16:
            return f"IPEX's XPU kernel takes float16 activations and scales, not {target.dtype} and {spec.scale_dtype}"
        if not spec.sym:
            return "IPEX's XPU kernel computes asymmetric weights with zero point 8"
        if not power_of_two or spec.group_size < 32 or spec.in_features % spec.group_size:
            return f"IPEX's XPU kernel wants groups that are a power of two from 32 and divide in_features, not {spec.group_size}"
        return None
    if spec.group_size != spec.in_features and (not power_of_two or spec.in_features % spec.group_size):
        return f"IPEX's CPU kernel wants groups that are a power of two and divide in_features, not {spec.group_size}"
    if spec.in_features % 4 or spec.out_features == 1:
        return (
            f"IPEX's CPU kernel wants in_features a multiple of 4 and out_features above 1, not "
            f"{spec.in_features} and {spec.out_features}"
        )
    return None


def cpu_arguments(weight: QuantizedWeight) -> tuple[Any, ...]:
    """What `weight_only_qlinear_prepack_int4` is called with.

    The weight as uint8 [N, K/2] with the even input in the low half, scales float32 [N, G], zeros int32 [N, G] or None
    for 8; computing in the dtype of the activations, which are not quantized.
    """
    spec = weight.spec
    one_group = spec.group_size == spec.in_features
    return (
        packing.pack_floor(weight.codes, 4, torch.int8).view(torch.uint8),
        weight.scales.float(),
        None if spec.sym else weight.zeros.to(torch.int32),
        None,  # bias: QuantLinear adds it
        weight.g_idx,
        None,  # batch size to tune for
        -1 if one_group else spec.group_size,
        0,  # lowp_mode NONE
        -1,  # act_quant_mode NONE
        False,  # no second copy for large batches
        0,  # weight_format PLAIN
    )


def _prepack(weight: QuantizedWeight) -> CpuState:
    context = torch.ops.ipex_prepack.weight_only_qlinear_prepack_int4(*cpu_arguments(weight))
    return CpuState(context, context.get_data_handle())


def arrange_xpu(weight: QuantizedWeight) -> XpuState:
    """The XPU kernel's form of a symmetric `weight`, on whatever device it is."""
    codes, columns = weight.codes, None
    if weight.g_idx is not None:
        columns = torch.argsort(weight.groups_of_inputs(), stable=True)
        codes = codes[:, columns]
    words = packing.pack_dense(codes.t(), 4)  # [K/8, N]
    return XpuState(
        group_size=weight.spec.group_size,
        weight=row_major(words.t()).t(),
        scales=row_major(weight.scales.to(torch.float16).t()),
        zeros=torch.tensor([8], dtype=torch.int8, device=codes.device),
        columns=columns,
    )
