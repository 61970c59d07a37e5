"""Triton kernels for every bit width from 2 to 8: the portable second way, wherever Triton runs (NVIDIA, XPU).

One kernel serves decode and prefill; a tuned table (`TUNED`, measured, per device) says how it is tiled and how often K
is split, and nothing is tuned at a user's first call. Split sums go through a float32 workspace and a second, tiny
kernel that adds them in a fixed order, so results repeat to the bit. What it gives up against csrc/cuda: weights pass
through registers in whatever layout the compiler picks, so each word is loaded several times (from L1).

Codes are stored as bit planes of 8, 4, 2 and 1 bits, as the binary digits of the width say (3 = 2 + 1): no code ever
straddles a word, and one loop reads every width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from woq.backends.base import Backend, Target
from woq.weights import PackedWeight, QuantizedWeight, WeightSpec

WORD = 32
K_MULTIPLE = 128  # rows of codes are padded to this, so that every plane ends on a word


@dataclass(frozen=True)
class Tiling:
    """How a product is cut up: block sizes, parts of K, warps and pipeline stages of one program."""

    block_m: int
    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int


# Up to so many tokens: this tiling. The last entry has no bound. Keys are prefixes of the device's name; "" is any.
# Measured on an H200 (4 bits, group 128, the linears of Llama-3-8B).
TUNED: dict[str, tuple[tuple[int | None, Tiling], ...]] = {
    "": (
        (16, Tiling(16, 64, 64, 4, 4, 4)),
        (64, Tiling(64, 128, 64, 4, 8, 3)),
        (None, Tiling(128, 64, 64, 1, 4, 3)),
    ),
}


@triton.jit  # type: ignore[untyped-decorator]
def _plane(words, row_length, k_padded, k, n, mask, BITS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: PLR0913
    """The plane of WIDTH bits, moved to its place in the codes: wider planes come first and hold the lower bits."""
    below: tl.constexpr = BITS - BITS % (2 * WIDTH)  # bits held by wider planes
    per_word: tl.constexpr = 32 // WIDTH
    row = k_padded * below // 32 + k // per_word
    word = tl.load(words + row[:, None] * row_length + n[None, :], mask=mask, other=0)
    return ((word >> ((k % per_word) * WIDTH)[:, None]) & ((1 << WIDTH) - 1)) << below


@triton.jit  # type: ignore[untyped-decorator]
def _codes(words, row_length, k_padded, k, n, mask, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes [k, n] from the bit planes of `words`."""
    code = tl.zeros((k.shape[0], n.shape[0]), dtype=tl.int32)
    if BITS & 8:
        code |= _plane(words, row_length, k_padded, k, n, mask, BITS, 8)
    if BITS & 4:
        code |= _plane(words, row_length, k_padded, k, n, mask, BITS, 4)
    if BITS & 2:
        code |= _plane(words, row_length, k_padded, k, n, mask, BITS, 2)
    if BITS & 1:
        code |= _plane(words, row_length, k_padded, k, n, mask, BITS, 1)
    return code


@triton.jit  # type: ignore[untyped-decorator]
def _linear_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    x,
    words,
    scales,
    zeros,
    order,
    out,
    m_size,
    n_size,
    k_size,
    k_padded,
    group_size,
    BITS: tl.constexpr,
    SYM: tl.constexpr,
    ORDERED: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """out[split, m, n] = sum over the split's part of k of x[m, k] * scale[g, n] * (code[k, n] - zero[g, n])."""
    tiles_m = tl.cdiv(m_size, BLOCK_M)
    program, split = tl.program_id(0), tl.program_id(1)
    m = (program % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)  # neighbours share a tile of weights
    n = (program // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(split * BLOCK_K, k_size, BLOCK_K * SPLIT_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (k < k_size)[:, None] & (n < n_size)[None, :]
        columns = k
        if ORDERED:
            columns = tl.load(order + k, mask=k < k_size, other=0)
        left_mask = (m < m_size)[:, None] & (k < k_size)[None, :]
        left = tl.load(x + m.to(tl.int64)[:, None] * k_size + columns[None, :], mask=left_mask, other=0.0)
        code = _codes(words, n_size, k_padded, k, n, inside, BITS)
        if ONE_GROUP:  # the whole tile has one scale a column: multiply exact integers, scale their sum
            place = (start // group_size) * n_size + n
            scale = tl.load(scales + place, mask=n < n_size, other=0.0).to(tl.float32)
            zero = tl.full((BLOCK_N,), 1 << (BITS - 1), tl.int32)
            if not SYM:
                zero = tl.load(zeros + place, mask=n < n_size, other=0).to(tl.int32)
            right = (code - zero[None, :]).to(left.dtype)
            total += tl.dot(left, right, input_precision="ieee") * scale[None, :]
        else:
            place = (k // group_size)[:, None] * n_size + n[None, :]
            scale = tl.load(scales + place, mask=inside, other=0.0).to(tl.float32)
            zero = tl.full((BLOCK_K, BLOCK_N), 1 << (BITS - 1), tl.int32)
            if not SYM:
                zero = tl.load(zeros + place, mask=inside, other=0).to(tl.int32)
            right = ((code - zero).to(tl.float32) * scale).to(left.dtype)
            total += tl.dot(left, right, input_precision="ieee")
    at = out + (split * m_size + m).to(tl.int64)[:, None] * n_size + n[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(m < m_size)[:, None] & (n < n_size)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _sum_kernel(parts, out, size, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[i] = sum over s of parts[s, i], in order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in tl.static_range(SPLIT_K):
        total += tl.load(parts + split * size + i, mask=i < size, other=0.0)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < size)


@dataclass(frozen=True, eq=False)
class TritonState:
    """A weight as bit planes.

    words: int32 [K' * bits / 32, N], K' = K padded to 128; scales: [G, N]; zeros: uint8 [G, N], or None when symmetric
    order: int32 [K], which column of x meets which row of the weight (act-order), or None
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    in_features: int
    bits: int
    group_size: int


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [N, K] -> int32 [K' * bits / 32, N], planes of falling width one after the other."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % K_MULTIPLE)).t()  # [K', N]
    planes, taken = [], 0
    for width in (8, 4, 2, 1):
        if not bits & width:
            continue
        per_word = WORD // width
        fields = (padded >> taken) & ((1 << width) - 1)
        by_word = fields.reshape(-1, per_word, fields.shape[1])
        plane = torch.zeros(by_word.shape[0], by_word.shape[2], dtype=torch.int32, device=codes.device)
        for i in range(per_word):
            plane |= by_word[:, i].to(torch.int32) << (width * i)
        planes.append(plane)
        taken += width
    return torch.cat(planes)


def arrange(weight: QuantizedWeight) -> TritonState:
    """The kernels' form of `weight`. With act-order rows are sorted by group; groups may be of any size then."""
    spec = weight.spec
    codes, scales, zeros, order, group_size = weight.codes, weight.scales, weight.zeros, None, spec.group_size
    if weight.g_idx is not None:
        groups = weight.g_idx.to(torch.int64)
        columns = torch.argsort(groups, stable=True)
        codes, order = codes[:, columns], columns.to(torch.int32)
        regular = torch.arange(spec.in_features, device=groups.device) // spec.group_size
        if not torch.equal(groups[columns], regular):  # irregular: one scale an input
            scales, zeros, group_size = scales[:, groups[columns]], zeros[:, groups[columns]], 1
    return TritonState(
        words=pack_planes(codes, spec.bits),
        scales=scales.t().contiguous(),
        zeros=None if spec.sym else zeros.t().contiguous(),
        order=order,
        in_features=spec.in_features,
        bits=spec.bits,
        group_size=group_size,
    )


def tiling_for(tokens: int, device: torch.device) -> Tiling:
    """The table's entry for this device and number of tokens."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    table = next(table for prefix, table in sorted(TUNED.items(), reverse=True) if name.startswith(prefix))
    return next(tiling for bound, tiling in table if bound is None or tokens <= bound)


def run(x: Tensor, state: TritonState, tiling: Tiling) -> Tensor:
    """The product with a given tiling: x [M, K] contiguous -> [M, N]."""
    m, k, n = x.shape[0], state.in_features, state.words.shape[1]
    t, y = tiling, x.new_empty(x.shape[0], state.words.shape[1])
    if m == 0:
        return y
    parts = y if t.split_k == 1 else x.new_empty(t.split_k, m, n, dtype=torch.float32)
    grid = (triton.cdiv(m, t.block_m) * triton.cdiv(n, t.block_n), t.split_k)
    _linear_kernel[grid](
        x,
        state.words,
        state.scales,
        state.words if state.zeros is None else state.zeros,  # some pointer: not read
        state.words if state.order is None else state.order,
        parts,
        m,
        n,
        k,
        -(-k // K_MULTIPLE) * K_MULTIPLE,
        state.group_size,
        BITS=state.bits,
        SYM=state.zeros is None,
        ORDERED=state.order is not None,
        ONE_GROUP=state.group_size % t.block_k == 0,
        BLOCK_M=t.block_m,
        BLOCK_N=t.block_n,
        BLOCK_K=t.block_k,
        SPLIT_K=t.split_k,
        num_warps=t.num_warps,
        num_stages=t.num_stages,
    )
    if t.split_k > 1:
        _sum_kernel[(triton.cdiv(m * n, 1024),)](parts, y, m * n, SPLIT_K=t.split_k, BLOCK=1024)
    return y


@torch.library.custom_op("woq::triton_linear", mutates_args=())
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
    return run(x, state, tiling_for(x.shape[0], x.device))


@triton_linear.register_fake
def _(x: Tensor, words: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], words.shape[1])


def dequantize(state: TritonState, dtype: torch.dtype) -> Tensor:
    """The float weight [N, K], columns in the checkpoint's order. In plain torch: for gradients."""
    k = torch.arange(state.in_features, device=state.words.device)
    k_padded, row, taken = -(-state.in_features // K_MULTIPLE) * K_MULTIPLE, 0, 0
    codes = torch.zeros(state.in_features, state.words.shape[1], dtype=torch.int32, device=k.device)
    for width in (8, 4, 2, 1):
        if state.bits & width:
            per_word = WORD // width
            shifts = ((k % per_word) * width).to(torch.int32)
            codes |= ((state.words[row + k // per_word] >> shifts[:, None]) & ((1 << width) - 1)) << taken
            row, taken = row + k_padded // per_word, taken + width
    group = k // state.group_size
    zeros = 1 << (state.bits - 1) if state.zeros is None else state.zeros[group].float()
    weight = ((codes.float() - zeros) * state.scales[group].float()).t().to(dtype)
    if state.order is None:
        return weight
    return torch.empty_like(weight).index_copy_(1, state.order.to(torch.int64), weight)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output  # passed by name
    x, words, scales, zeros, order, bits, group_size = inputs
    ctx.save_for_backward(words, scales, zeros, order)
    ctx.rest = (x.shape[1], bits, group_size)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (grad @ dequantize(TritonState(*ctx.saved_tensors, *ctx.rest), grad.dtype), *[None] * 6)


triton_linear.register_autograd(_backward, setup_context=_remember)


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
        return None

    def prepare(self, packed: PackedWeight, target: Target) -> TritonState:
        return arrange(packed.to(target.device).unpack())

    def apply(self, x: Tensor, state: TritonState) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        y: Tensor = triton_linear(
            flat, state.words, state.scales, state.zeros, state.order, state.bits, state.group_size
        )
        return y.reshape(*x.shape[:-1], y.shape[-1])
