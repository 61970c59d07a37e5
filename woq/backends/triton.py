"""Triton kernels for every bit width from 2 to 8: the portable second way, wherever Triton runs (NVIDIA, XPU).

`prepare` lays weights out once (triton_layout.py); `apply` is one operator (triton_ops.py), so it works under torch.compile,
CUDA graphs and autograd. This module loads no Triton until a layer is prepared. docs/triton.md says how fast it is, and
why.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil

import torch
from torch import Tensor

from woq.backends.base import Backend, Target
from woq.backends.triton_layout import TritonState, arrange
from woq.weights import PackedWeight, WeightSpec

_OLDEST = (8, 0)  # compute capability


@functools.cache
def missing() -> str | None:
    """What Triton lacks on this machine."""
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed"
    if shutil.which("gcc") is None and shutil.which("clang") is None:
        return "Triton needs a C compiler to start kernels; there is neither gcc nor clang"
    return None


class TritonBackend(Backend[TritonState]):
    """Triton kernels, wherever torch and Triton share a GPU."""

    name = "triton"

    def why_not(self, spec: WeightSpec, target: Target) -> str | None:
        if not 2 <= spec.bits <= 8:
            return f"has kernels for 2 to 8 bits, not for {spec.bits}"
        if target.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"computes in bfloat16, float16 and float32, not in {target.dtype}"
        if target.device.type not in ("cuda", "xpu"):
            return f"Triton has no compiler for {target.device.type}"
        if target.device.type == "cuda" and torch.cuda.is_available():
            if torch.version.hip is not None:
                return "has never been tried on an AMD GPU"
            capability = torch.cuda.get_device_capability(target.device)
            if capability < _OLDEST:
                return f"needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
        return missing()

    def prepare(self, packed: PackedWeight, target: Target) -> TritonState:
        import woq.backends.triton_ops  # noqa: F401  registers the operators

        return arrange(packed.to(target.device).unpack())

    def apply(self, x: Tensor, state: TritonState) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        y: Tensor = torch.ops.woq.triton_linear(
            flat, state.words, state.scales, state.zeros, state.order, state.bits, state.group_size
        )
        return y.reshape(*x.shape[:-1], y.shape[-1])
