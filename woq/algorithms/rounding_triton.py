"""`rounding.round_span` as one kernel: a span's features in turn, with the output rows spread over the programs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_N = 32
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and taking it away rounds half to even


@triton.jit  # type: ignore[untyped-decorator]
def _round_span(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    rows, u, scale, zero, begin, codes, errors, n, span, scale_stride, top,
    BEGUN: tl.constexpr, SPAN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, SPAN)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = column < n
    tile = tl.load(
        rows + at[:, None] * n + column[None, :], mask=(at < span)[:, None] & there[None, :], other=0.0
    )
    for j in range(span):
        w = tl.sum(tl.where((at == j)[:, None], tile, 0.0), axis=0)
        s = tl.load(scale + j * scale_stride + column, mask=there, other=1.0)
        z = tl.load(zero + j * scale_stride + column, mask=there, other=0.0)
        # Beyond the grid's ends rounding does not matter, and the magic number works below 2^22 only.
        level = tl.minimum(tl.maximum(tl.div_rn(w, s), -1024.0), 1024.0)
        code = tl.minimum(tl.maximum((level + _MAGIC) - _MAGIC + z, 0.0), top)
        pivot = tl.load(u + j * span + j)
        if BEGUN:
            w = tl.load(begin + j * n + column, mask=there, other=0.0)
        error = tl.div_rn(w - (code - z) * s, pivot)
        tl.store(codes + j * n + column, code, mask=there)
        tl.store(errors + j * n + column, error, mask=there)
        later = tl.load(u + j * span + at, mask=(at < span) & (at > j), other=0.0)
        tile -= later[:, None] * error[None, :]


def round_span(
    rows: Tensor, u: Tensor, scale: Tensor, zero: Tensor, bits: int, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `rounding.round_span`, in another order of summation: results differ by float32 rounding."""
    span, n = rows.shape
    codes, errors = torch.empty_like(rows), torch.empty_like(rows)
    stride = n if len(scale) > 1 else 0
    _round_span[(triton.cdiv(n, _BLOCK_N),)](
        rows, u, scale, zero, rows if start is None else start, codes, errors, n, span, stride, float((1 << bits) - 1),
        BEGUN=start is not None, SPAN=max(16, triton.next_power_of_2(span)), BLOCK_N=_BLOCK_N,
    )  # fmt: skip
    return codes, errors
