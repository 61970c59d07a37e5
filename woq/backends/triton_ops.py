"""The products on Triton kernels as PyTorch operators: `woq::triton_linear`, with a gradient, and `woq::triton_dequantize`.

They launch the kernels of triton_kernels.py as the tables of triton_plans.py say. No sum depends on the order in which
programs run, so results repeat to the bit.
"""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, library

from woq.backends import triton_kernels as kernels
from woq.backends.triton_layout import WIDTHS, TritonState, block_of, fits_kernels
from woq.backends.triton_plans import DENSE, Plan, fitted, plan_for

PREFETCH = 4096  # bytes of a program's weights that are fetched into L2 before the kernel before has ended
_GATHER_BLOCK, _SUM_BLOCK, _DEQUANTIZE_N = 1024, 1024, 64


class Abilities(NamedTuple):
    """What a device can do: its name, bytes of shared memory, inline PTX, kernels that start before others have ended."""

    name: str
    shared: int
    packed: bool
    early: bool


@functools.cache
def abilities(device: torch.device) -> Abilities:
    """What is known of `device`; where nothing is known, as little as every GPU has."""
    if device.type not in ("cuda", "xpu"):
        return Abilities("", 65536, False, False)
    index = device.index if device.index is not None else getattr(torch, device.type).current_device()
    shared = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    if device.type == "xpu" or torch.version.hip is not None:
        return Abilities(getattr(torch, device.type).get_device_name(device), shared, False, False)
    capability = torch.cuda.get_device_capability(device)
    return Abilities(
        torch.cuda.get_device_name(device),
        shared,
        kernels.CAN_PACK and capability >= (8, 0),
        kernels.CAN_START_EARLY and capability >= (9, 0),
    )


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton starts kernels on the current device, which need not be the tensors'."""
    return getattr(torch, device.type).device(device) if device.type in ("cuda", "xpu") else nullcontext()


def _early(device: torch.device, wanted: bool) -> dict[str, bool]:
    """Keyword arguments of a launch that may start early."""
    return {"EARLY": True, "launch_pdl": True} if wanted and abilities(device).early else {"EARLY": False}


def _weight_constants(state: TritonState) -> dict[str, Any]:
    """What every kernel that reads the weight is compiled for."""
    wa, wb, wc = (*WIDTHS[state.bits], 0, 0)[:3]
    packed = abilities(state.words.device).packed
    return {
        "WA": wa, "WB": wb, "WC": wc, "BLOCK": block_of(state.bits), "SYM": state.zeros is None, "PACKED": packed,
    }  # fmt: skip


def gather(x: Tensor, order: Tensor) -> Tensor:
    """x[:, order], x [M, K]."""
    out = torch.empty_like(x)
    if out.numel():
        grid = (x.shape[0], triton.cdiv(x.shape[1], _GATHER_BLOCK))
        kernels._gather_kernel[grid](x, order, out, x.shape[1], BLOCK=_GATHER_BLOCK, **_early(x.device, True))
    return out


def dequantize(state: TritonState, dtype: torch.dtype, first: int = 0, count: int | None = None) -> Tensor:
    """Rows `first` (a multiple of 16) to `first + count` of the weight [N, K], columns in the kernels' order."""
    n, k = state.scales.shape[1], state.in_features
    count = n - first if count is None else count
    out = torch.empty(count, k, dtype=dtype, device=state.words.device)
    zeros = state.scales if state.zeros is None else state.zeros
    constants = _weight_constants(state)
    constants["PACKED"] &= dtype != torch.float32
    blocks = state.words.shape[1]
    grid = (blocks, triton.cdiv(count, _DEQUANTIZE_N))
    kernels._dequantize_kernel[grid](
        state.words[first // 16 :], state.scales[:, first:], zeros[:, first:], out,
        count, n, k, blocks, state.group_size,
        BY_RUN=state.group_size % 32 == 0, BLOCK_N=_DEQUANTIZE_N, **constants,
    )  # fmt: skip
    return out


def _dense(x: Tensor, state: TritonState, y: Tensor, plan: Plan) -> None:
    """Some outputs at a time: a weight that fits into L2 is written and read there, and needs little scratch."""
    for first in range(0, y.shape[1], plan.block_n):
        part = y[:, first : first + plan.block_n]
        weight = dequantize(state, x.dtype, first, part.shape[1])
        torch.mm(x, weight.t(), out=part)


def _decode(x: Tensor, state: TritonState, y: Tensor, plan: Plan) -> None:
    """A program has all of K; nothing is left to sum."""
    constants = _product_constants(state, plan)
    row = math.prod(state.words.shape[1:]) * state.words.element_size()  # bytes that 16 outputs have
    grid = (triton.cdiv(x.shape[0], plan.block_m) * triton.cdiv(y.shape[1], plan.block_n),)
    kernels._decode_kernel[grid](
        *_operands(x, state, y), min(PREFETCH, row),
        EVEN=_even(state, plan.block_n, constants["BLOCK"] * plan.parts),
        **constants, **_early(x.device, plan.early),
    )  # fmt: skip


def _prefill(x: Tensor, state: TritonState, y: Tensor, plan: Plan) -> None:
    """Where K is shared among programs, their parts are added by a second kernel."""
    constants = _product_constants(state, plan)
    out = y if plan.parts == 1 else x.new_empty(plan.parts, *y.shape, dtype=torch.float32)
    grid = (triton.cdiv(x.shape[0], plan.block_m) * triton.cdiv(y.shape[1], plan.block_n), plan.parts)
    kernels._prefill_kernel[grid](
        *_operands(x, state, out), EVEN=_even(state, plan.block_n, constants["BLOCK"]), **constants
    )
    if plan.parts > 1:
        size = y.numel()
        kernels._sum_kernel[(triton.cdiv(size, _SUM_BLOCK),)](
            out, y, size, PARTS=plan.parts, BLOCK=_SUM_BLOCK
        )


def _operands(x: Tensor, state: TritonState, out: Tensor) -> tuple[Tensor | int, ...]:
    """The arguments of both products; a pointer that is not read may be any."""
    zeros = state.scales if state.zeros is None else state.zeros
    groups, n = state.scales.shape
    m, k, blocks = x.shape[0], state.in_features, state.words.shape[1]
    return x, state.words, state.scales, zeros, out, m, n, k, blocks, groups


def _product_constants(state: TritonState, plan: Plan) -> dict[str, Any]:
    """What both products are compiled for."""
    return {
        **_weight_constants(state), "GROUP": 0 if state.scales.shape[0] == 1 else state.group_size,
        "BLOCK_M": plan.block_m, "BLOCK_N": plan.block_n, "PARTS": plan.parts, "STAGES": plan.stages,
        "num_warps": plan.warps, "num_stages": plan.stages,
    }  # fmt: skip


def _even(state: TritonState, block_n: int, block_k: int) -> bool:
    """Whether tiles divide the weight, so that nothing but tokens is masked."""
    return state.scales.shape[1] % block_n == 0 and state.in_features % block_k == 0


_KERNELS = {"decode": _decode, "prefill": _prefill, "dense": _dense}


def run(x: Tensor, state: TritonState, plan: Plan) -> Tensor:
    """The product with a given plan: x [M, K] contiguous, columns in the kernels' order -> [M, N]."""
    y = x.new_empty(x.shape[0], state.scales.shape[1])
    if x.shape[0]:
        _KERNELS[plan.kernel](x, state, y, plan)
    return y


@functools.lru_cache(maxsize=4096)
def _plan(tokens: int, n: int, k: int, bits: int, group_size: int, half: bool, device: torch.device) -> Plan:
    if not half or not fits_kernels(bits, group_size):
        return DENSE
    known = abilities(device)
    return fitted(plan_for(known.name, bits, tokens, n, k), bits, known.shared)


@library.custom_op("woq::triton_linear", mutates_args=())
def triton_linear(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """x [M, K] times a weight in the form of `TritonState` -> [M, N]."""
    state = TritonState(words, scales, zeros, order, x.shape[1], bits, group_size)
    half = x.dtype in (torch.bfloat16, torch.float16)
    plan = _plan(x.shape[0], scales.shape[1], x.shape[1], bits, group_size, half, x.device)
    with _on(x.device):
        return run(x if order is None else gather(x, order), state, plan)


@triton_linear.register_fake
def _(x: Tensor, *weight: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight[1].shape[1])  # scales [G, N]


@library.custom_op("woq::triton_dequantize", mutates_args=())
def triton_dequantize(
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    in_features: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The float weight [N, K] of a weight in the form of `TritonState`, columns in the kernels' order."""
    with _on(words.device):
        return dequantize(TritonState(words, scales, zeros, None, in_features, bits, group_size), dtype)


@triton_dequantize.register_fake
def _(words: Tensor, scales: Tensor, *rest: Any) -> Tensor:
    return words.new_empty(scales.shape[1], rest[1], dtype=rest[-1])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output  # passed by name
    x, words, scales, zeros, order, bits, group_size = inputs
    ctx.save_for_backward(words, scales, zeros, order)
    ctx.rest = (x.shape[1], bits, group_size)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    words, scales, zeros, order = ctx.saved_tensors
    dx = grad @ triton_dequantize(words, scales, zeros, *ctx.rest, grad.dtype)
    if order is not None:
        dx = torch.empty_like(dx).index_copy(1, order.to(torch.int64), dx)
    return (dx, *[None] * 6)


triton_linear.register_autograd(_backward, setup_context=_remember)
