"""HQQ: grids of least |error|^0.7, by half-quadratic splitting. No data.

Badri & Shaji 2023, https://mobiusml.github.io/hqq_blog. An extra variable e takes the part of the error that is to be forgiven:
large errors almost whole, small ones not at all. In turn, e is shrunk from the error of the grid at hand, and the grid is
fitted to w - e by least squares:

    e = shrink(w - scale * (q - zero))        zero = mean(q - (w - e) / scale)

Differences from the authors' code:
- Errors are measured in steps of the grid. Theirs are those of the weights as they are, so small that all are forgiven nothing.
- Every group keeps its own best iterate, where theirs stops all groups at once.
- A whole zero point seldom moves and a symmetric one never: there the scale is fitted to w - e too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from woq.quant import Grid, dequantize, group_params, quantize, quantize_between, storable_scale

NORM = 0.7  # p of the |error|^p that is minimised
_BETA, _GROWTH, _ITERATIONS = 10.0, 1.01, 20  # the authors'


def hqq_params(
    w: Tensor, bits: int, sym: bool, scale_dtype: torch.dtype, grid: Grid = "plain"
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every group of w [..., gs]; arguments and result as of `quant.group_params`."""
    scale, zero = (t.unsqueeze(-1) for t in group_params(w, bits, sym, scale_dtype, "minmax", grid=grid))
    best_scale, best_zero = scale, zero
    to_codes = quantize_between if grid == "float_zeros" else quantize
    codes = to_codes(w, scale, zero, bits)
    least = _error(w, codes, scale, zero)
    beta = _BETA
    for _ in range(_ITERATIONS):
        target = w - _shrink(w / scale - (codes - zero), beta) * scale
        if not sym:
            zero = (codes - target / scale).mean(-1, keepdim=True).clamp_(0, (1 << bits) - 1)
            zero = zero.to(scale_dtype).float() if grid == "float_zeros" else zero.round()
        if grid != "float_zeros":
            scale = _fitted_scale(codes - zero, target, scale, scale_dtype)
        codes = to_codes(w, scale, zero, bits)
        error = _error(w, codes, scale, zero)
        better = error < least
        least = torch.where(better, error, least)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
        beta *= _GROWTH
    return best_scale.squeeze(-1), best_zero.squeeze(-1)


def _error(w: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """[..., 1]: mean |error|^NORM of each group."""
    return dequantize(codes, scale, zero).sub_(w).abs_().pow_(NORM).mean(-1, keepdim=True)


def _shrink(error: Tensor, beta: float) -> Tensor:
    """The minimiser over e of |e|^p + beta/2 (e - error)^2, as the authors approximate it."""
    size = error.abs()
    return error.sign() * (size - size.clamp(min=1e-12).pow(NORM - 1) / beta).clamp_(min=0)


def _fitted_scale(steps: Tensor, target: Tensor, before: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """The scale of least squared distance between scale * steps and target; the one before where all steps are 0."""
    size = steps.square().sum(-1, keepdim=True)
    fitted = (steps * target).sum(-1, keepdim=True) / size.clamp(min=1)
    return storable_scale(torch.where((size == 0) | (fitted == 0), before, fitted), scale_dtype)
