"""`tunable.fake_quantize` and its gradients as one kernel each: a training step reads and writes every weight once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LONGEST = 1024  # features of a group: a tile of them stays in registers
_TILE = 4096  # elements a program works on
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and taking it away rounds half to even


@triton.jit
def _place(latent, offset, scale, zero, top):  # type: ignore[no-untyped-def]
    """Code, whether it is clamped nowhere, and the latent weight in codes."""
    position = tl.div_rn(latent, scale)
    # Beyond the grid's ends rounding does not matter, and the magic number works below 2^22 only.
    near = tl.minimum(tl.maximum(position + offset + zero, -1024.0), 1024.0)
    rounded = (near + _MAGIC) - _MAGIC
    code = tl.minimum(tl.maximum(rounded, 0.0), top)
    return code, code == rounded, position


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    latent, offset, scale, zero, top, result, rows, size, SIZE: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SIZE)
    here = row < rows
    at = row.to(tl.int64)[:, None] * size + column[None, :]
    there = here[:, None] & (column < size)[None, :]
    s = tl.load(scale + row, mask=here, other=1.0)[:, None] + tl.zeros((ROWS, SIZE), tl.float32)
    z = tl.load(zero + row, mask=here, other=0.0)[:, None]
    m = tl.load(top + row, mask=here, other=1.0)[:, None]
    code, _, _ = _place(
        tl.load(latent + at, mask=there, other=0.0), tl.load(offset + at, mask=there, other=0.0), s, z, m
    )
    tl.store(result + at, ((code - z) * s).to(result.dtype.element_ty), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    grad, latent, offset, scale, zero, top, to_offset, to_scale, to_zero, rows, size,
    SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SIZE)
    here = row < rows
    at = row.to(tl.int64)[:, None] * size + column[None, :]
    there = here[:, None] & (column < size)[None, :]
    s = tl.load(scale + row, mask=here, other=1.0)[:, None] + tl.zeros((ROWS, SIZE), tl.float32)
    z = tl.load(zero + row, mask=here, other=0.0)[:, None]
    m = tl.load(top + row, mask=here, other=1.0)[:, None]
    code, inside, position = _place(
        tl.load(latent + at, mask=there, other=0.0), tl.load(offset + at, mask=there, other=0.0), s, z, m
    )
    pull = tl.load(grad + at, mask=there, other=0.0).to(tl.float32)
    scaled = pull * s
    moved = tl.where(inside, scaled, 0.0)
    tl.store(to_offset + at, moved, mask=there)
    tl.store(to_scale + row, tl.sum(pull * (code - z - tl.where(inside, position, 0.0)), axis=1), mask=here)
    tl.store(to_zero + row, tl.sum(moved - scaled, axis=1), mask=here)


class _FusedFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, latent: Tensor, offset: Tensor, scale: Tensor, zero: Tensor, top: Tensor, dtype: torch.dtype
    ) -> Tensor:
        result = torch.empty(latent.shape, dtype=dtype, device=latent.device)
        scale, zero = scale.contiguous(), zero.contiguous()
        ctx.save_for_backward(latent, offset, scale, zero, top)
        grid, sizes = _plan(latent)
        _forward[grid](latent, offset, scale, zero, top, result, *latent.shape, **sizes)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor, Tensor, None, None]:
        latent, offset, scale, zero, top = ctx.saved_tensors
        to_offset, to_scale, to_zero = (
            torch.empty_like(offset),
            torch.empty_like(scale),
            torch.empty_like(zero),
        )
        grid, sizes = _plan(latent)
        _backward[grid](
            grads[0].contiguous(), latent, offset, scale, zero, top, to_offset, to_scale, to_zero, *latent.shape, **sizes
        )  # fmt: skip
        return None, to_offset, to_scale, to_zero, None, None


def _plan(latent: Tensor) -> tuple[tuple[int], dict[str, int]]:
    rows, size = latent.shape
    padded = max(16, triton.next_power_of_2(size))
    each = max(1, _TILE // padded)
    return (triton.cdiv(rows, each),), {"SIZE": padded, "ROWS": each}


def fused_fake_quantize(
    latent: Tensor, offset: Tensor, scale: Tensor, zero: Tensor, top: Tensor, dtype: torch.dtype
) -> Tensor:
    """As `tunable.fake_quantize`; groups of at most `LONGEST`, everything contiguous."""
    result: Tensor = _FusedFakeQuantize.apply(latent, offset, scale, zero, top, dtype)  # type: ignore[no-untyped-call]
    return result
