"""`rounding.round_span` and `descend_span` as one kernel: a span's features in turn, the output rows spread over programs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_N = 32
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and taking it away rounds half to even


@triton.jit  # type: ignore[untyped-decorator]
def _span(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    rows, slope, u, u_row, u_column, scale, zero, scale_stride, codes, errors, n, span, top,
    DESCENT: tl.constexpr, SPAN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, SPAN)
    inside = at < span
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = column < n
    both = inside[:, None] & there[None, :]
    tile = tl.load(rows + at[:, None] * n + column[None, :], mask=both, other=0.0)
    pivots = tl.load(u + at * (u_row + u_column), mask=inside, other=1.0)
    if DESCENT:  # where each feature would best be
        pull = tl.load(slope + at[:, None] * n + column[None, :], mask=both, other=0.0)
        tile -= tl.div_rn(pull, pivots[:, None] + tl.zeros_like(pull))
    for j in range(span):
        w = tl.sum(tl.where((at == j)[:, None], tile, 0.0), axis=0)
        s = tl.load(scale + j * scale_stride + column, mask=there, other=1.0)
        z = tl.load(zero + j * scale_stride + column, mask=there, other=0.0)
        # Beyond the grid's ends rounding does not matter, and the magic number works below 2^22 only.
        level = tl.minimum(tl.maximum(tl.div_rn(w, s), -1024.0), 1024.0)
        code = tl.minimum(tl.maximum((level + _MAGIC) - _MAGIC + z, 0.0), top)
        later = tl.load(u + j * u_row + at * u_column, mask=inside & (at > j), other=0.0)
        if DESCENT:
            error = (code - z) * s - tl.load(rows + j * n + column, mask=there, other=0.0)
            later = tl.div_rn(later, pivots)
        else:
            error = tl.div_rn(w - (code - z) * s, tl.load(u + j * (u_row + u_column)))
        tl.store(codes + j * n + column, code, mask=there)
        tl.store(errors + j * n + column, error, mask=there)
        tile -= later[:, None] * error[None, :]


def _run(  # noqa: PLR0913 - a kernel's arguments
    rows: Tensor,
    slope: Tensor,
    u: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    codes: Tensor,
    descent: bool,
) -> Tensor:
    span, n = rows.shape
    errors = torch.empty_like(rows)
    stride = n if len(scale) > 1 else 0
    _span[(-(-n // _BLOCK_N),)](
        rows, slope, u, *u.stride(), scale, zero, stride, codes, errors, n, span, float((1 << bits) - 1),
        DESCENT=descent, SPAN=max(16, 1 << (span - 1).bit_length()), BLOCK_N=_BLOCK_N,
    )  # fmt: skip
    return errors


def round_span(rows: Tensor, u: Tensor, scale: Tensor, zero: Tensor, bits: int, codes: Tensor) -> Tensor:
    """As `rounding.round_span`, in another order of summation: results differ by float32 rounding."""
    return _run(rows, rows, u, scale, zero, bits, codes, descent=False)


def descend_span(
    value: Tensor, slope: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, bits: int, codes: Tensor
) -> Tensor:
    """As `rounding.descend_span`, likewise."""
    return _run(value, slope, hessian, scale, zero, bits, codes, descent=True)
