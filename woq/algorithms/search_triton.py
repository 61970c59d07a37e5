"""`quant.group_params` for one group of every output row as one kernel: a row's candidates are tried in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_N = 32
LONGEST = 1024  # features of a group: a tile of them stays in registers
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and taking it away rounds half to even
_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit  # type: ignore[untyped-decorator]
def _storable(wanted, smallest, largest, DTYPE: tl.constexpr, IS_BF16: tl.constexpr):  # type: ignore[no-untyped-def]
    magnitude = tl.minimum(tl.maximum(tl.abs(wanted), smallest), largest)
    if IS_BF16:  # by its bits, to nearest even: casts do not round alike everywhere
        bits = magnitude.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        magnitude = bits.to(tl.float32, bitcast=True)
    else:
        magnitude = magnitude.to(DTYPE).to(tl.float32)
    return tl.where(wanted < 0.0, -magnitude, magnitude)


@triton.jit  # type: ignore[untyped-decorator]
def _search(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    rows, costs, factors, scales, zeros, n, size, candidates, top, middle, smallest, largest,
    SYM: tl.constexpr, SIZE: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr,
    IS_BF16: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, SIZE)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = column < n
    w = tl.load(
        rows + at[:, None] * n + column[None, :], mask=(at < size)[:, None] & there[None, :], other=0.0
    )
    cost = tl.load(costs + at, mask=at < size, other=0.0)
    if SYM:
        span = tl.max(tl.abs(w), axis=0)
        span = tl.where(span == 0.0, 1.0, span)
        low, high = span, span
    else:
        low = tl.minimum(tl.min(w, axis=0), 0.0)
        high = tl.maximum(tl.max(w, axis=0), 0.0)
        high = tl.where(high == low, 1.0, high)
    least = tl.full((BLOCK_N,), float("inf"), tl.float32)
    best_scale = tl.full((BLOCK_N,), 1.0, tl.float32)
    best_zero = tl.full((BLOCK_N,), 0.0, tl.float32)
    for c in range(candidates):
        first, second = tl.load(factors + 2 * c), tl.load(factors + 2 * c + 1)
        wanted = span * first if SYM else tl.div_rn(high * second - low * first, top)
        scale = _storable(wanted, smallest, largest, DTYPE, IS_BF16)
        if SYM:
            zero = tl.full((BLOCK_N,), 1.0, tl.float32) * middle
        else:
            place = tl.minimum(tl.maximum(-tl.div_rn(low * first, scale), -1024.0), 1024.0)
            zero = tl.minimum(tl.maximum((place + _MAGIC) - _MAGIC, 0.0), top)
        # Beyond the grid's ends rounding does not matter, and the magic number works below 2^22 only.
        level = tl.minimum(tl.maximum(tl.div_rn(w, scale[None, :] + tl.zeros_like(w)), -1024.0), 1024.0)
        code = tl.minimum(tl.maximum((level + _MAGIC) - _MAGIC + zero[None, :], 0.0), top)
        miss = (code - zero[None, :]) * scale[None, :] - w
        error = tl.sum(miss * miss * cost[:, None], axis=0)
        better = error < least
        least = tl.where(better, error, least)
        best_scale = tl.where(better, scale, best_scale)
        best_zero = tl.where(better, zero, best_zero)
    tl.store(scales + column, best_scale, mask=there)
    tl.store(zeros + column, best_zero, mask=there)


def best_params(
    rows: Tensor,
    costs: Tensor,
    factors: Tensor,
    bits: int,
    sym: bool,
    scale_dtype: torch.dtype,
    smallest: float,
) -> tuple[Tensor, Tensor]:
    """Scale and zero [N] of a group, rows float32 [gs, N], gs at most `LONGEST`: the candidate of least error.

    costs: float32 [gs]. factors: float32 [C, 2]: of (low, high) end; where symmetric the first is the scale over absmax.
    As `quant.group_params`, errors summed up in another order.
    """
    size, n = rows.shape
    scales, zeros = torch.empty(n, device=rows.device), torch.empty(n, device=rows.device)
    _search[(triton.cdiv(n, _BLOCK_N),)](
        rows, costs.contiguous(), factors, scales, zeros, n, size, len(factors), float((1 << bits) - 1), float(1 << (bits - 1)),
        smallest, torch.finfo(scale_dtype).max,
        SYM=sym, SIZE=max(16, triton.next_power_of_2(size)), BLOCK_N=_BLOCK_N, DTYPE=_DTYPES[scale_dtype],
        IS_BF16=scale_dtype == torch.bfloat16,
    )  # fmt: skip
    return scales, zeros
