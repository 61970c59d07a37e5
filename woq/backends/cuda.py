"""The package's own CUDA kernels (csrc/cuda): 2, 3, 4 and 8 bits, bf16 and fp16 activations, any number of tokens.

`prepare` reorders codes and scales once into the order the kernels' threads hold them in (cuda_layout.py). `apply` is one
operator, `woq::cuda_linear`, which picks kernel and launch from its table (csrc/cuda/plan.h); it is registered with a
fake implementation and a gradient for x, so it works under torch.compile, CUDA graphs and autograd. docs/cuda.md says
how the kernels work and what they reach.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, library

from woq import native
from woq.backends.base import Backend, Target
from woq.backends.cuda_layout import pack_scales, pack_weight
from woq.errors import BackendError
from woq.weights import PackedWeight, QuantizedWeight, WeightSpec

BITS = (2, 3, 4, 8)
GROUP_UNIT = 32  # the kernels scale at the earliest after this many inputs
_DTYPES = (torch.bfloat16, torch.float16)
_OLDEST = (8, 0)  # compute capability: mma.sync with bf16, cp.async


@dataclass(frozen=True, eq=False)
class CudaState:
    """A weight in the kernels' order; see cuda_layout.py.

    weight: int32 [ceil(N/64), ceil(K/64), 128 * bits]; scales: uint8 [ceil(N/64), G, 128 or 192]
    order: int32 [K], which column of x meets which column of the weight (act-order), or None
    group_size: of the kernels, a multiple of 32: as the checkpoint's, or rounded up where one group covers all of K
    """

    weight: Tensor
    scales: Tensor
    order: Tensor | None
    out_features: int
    bits: int
    group_size: int
    scale_is_bf16: bool


class CudaBackend(Backend[CudaState]):
    """Hand-written kernels for NVIDIA GPUs from compute capability 8.0 on; fastest on 9.0."""

    name = "cuda"

    def why_not(self, spec: WeightSpec, target: Target) -> str | None:
        reason = _why_not_weight(spec, target)
        if reason is not None:
            return reason
        if target.device.type != "cuda" or not torch.cuda.is_available():
            return "needs an NVIDIA GPU"
        capability = torch.cuda.get_device_capability(target.device)
        if capability < _OLDEST:
            return f"needs compute capability {_OLDEST[0]}.{_OLDEST[1]}, this GPU has {capability[0]}.{capability[1]}"
        return native.why_not("cuda")

    def prepare(self, packed: PackedWeight, target: Target) -> CudaState:
        """Reorder on the device. Synchronizes: the kernels fetch weights before earlier kernels have ended."""
        _register()
        state = arrange(packed.to(target.device).unpack())
        torch.cuda.synchronize(target.device)
        return state

    def apply(self, x: Tensor, state: CudaState) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        y: Tensor = torch.ops.woq.cuda_linear(
            flat,
            state.weight,
            state.scales,
            state.order,
            state.out_features,
            state.bits,
            state.group_size,
            state.scale_is_bf16,
            True,  # start early: overlap with the end of the kernel before
            [],  # the table decides
        )
        return y.reshape(*x.shape[:-1], state.out_features)


def _why_not_weight(spec: WeightSpec, target: Target) -> str | None:
    if target.dtype not in _DTYPES:
        return f"computes in bfloat16 and float16, not in {target.dtype}"
    if spec.bits not in BITS:
        return f"has kernels for {BITS} bits, not for {spec.bits}"
    if spec.scale_dtype not in _DTYPES:
        return f"reads scales in bfloat16 and float16, not in {spec.scale_dtype}"
    if spec.group_size % GROUP_UNIT and spec.group_size < spec.in_features:
        return f"needs a group size that is a multiple of {GROUP_UNIT}, not {spec.group_size}"
    return None


def arrange(weight: QuantizedWeight) -> CudaState:
    """The kernels' form of `weight`, on whatever device it is. Raises BackendError for irregular groups."""
    spec = weight.spec
    codes, order = weight.codes, None
    if weight.g_idx is not None:
        groups = weight.g_idx.to(torch.int64)
        columns = torch.argsort(groups, stable=True)
        regular = torch.arange(spec.in_features, device=groups.device) // spec.group_size
        if not torch.equal(groups[columns], regular):
            raise BackendError(
                f"g_idx does not put {spec.group_size} inputs into every group",
                hint="run this layer with backend='reference'",
            )
        codes, order = codes[:, columns], columns.to(torch.int32)
    return CudaState(
        weight=pack_weight(codes, spec.bits),
        scales=pack_scales(weight.scales, None if spec.sym else weight.zeros),
        order=order,
        out_features=spec.out_features,
        bits=spec.bits,
        group_size=-(-spec.group_size // GROUP_UNIT) * GROUP_UNIT,
        scale_is_bf16=weight.scales.dtype == torch.bfloat16,
    )


def dequantize(state: CudaState, like: Tensor, in_features: int) -> Tensor:
    """The float weight [out_features, in_features] in `like`'s dtype, columns in the checkpoint's order."""
    weight: Tensor = torch.ops.woq.cuda_dequantize(
        state.weight,
        state.scales,
        like,
        state.out_features,
        in_features,
        state.bits,
        state.group_size,
        state.scale_is_bf16,
    )
    if state.order is None:
        return weight
    return torch.empty_like(weight).index_copy_(1, state.order.to(torch.int64), weight)


@functools.cache
def _register() -> None:
    """What the compiled operators do not bring themselves: shapes for tracing, and the gradient with respect to x."""

    def linear_shape(x: Tensor, *rest: Any) -> Tensor:
        return x.new_empty(x.shape[0], rest[3])

    def dense_shape(*args: Any) -> Tensor:
        like: Tensor = args[2]
        return like.new_empty(args[3], args[4])

    library.register_fake("woq::cuda_linear", linear_shape)
    library.register_fake("woq::cuda_dequantize", dense_shape)

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output  # passed by name
        x, weight, scales, order, *rest = inputs
        ctx.save_for_backward(weight, scales, order)
        ctx.rest, ctx.in_features = rest, x.shape[1]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scales, order = ctx.saved_tensors
        out_features, bits, group_size, scale_is_bf16, *_ = ctx.rest
        state = CudaState(weight, scales, order, out_features, bits, group_size, scale_is_bf16)
        return (grad @ dequantize(state, grad, ctx.in_features), *[None] * 9)

    library.register_autograd("woq::cuda_linear", backward, setup_context=remember)
