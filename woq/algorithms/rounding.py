"""Rounding a weight feature by feature with error feedback, and the grids that features are rounded on.

The order of features is the caller's: everything here is in rounding order, "position" counts in it. A span is a run
of positions inside one group; spans go one after the other, and inside a span every output row is independent of the
others, so that a GPU rounds a span in one kernel (`rounding_triton.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from woq.quant import Search, dequantize, group_params, quantize, storable_scale
from woq.weights import WeightSpec

# (start, end, float32 [K, N]: the weights, corrected for all errors made so far from the span's start on)
# -> scale, zero: [1, N] for the whole span, or [end - start, N]
SpanGrid = Callable[[int, int, Tensor], tuple[Tensor, Tensor]]


_NORMAL_ELEMENTS = 1 << 26  # of the rows' normal equations held at a time
_RIDGE = 0.01  # of a scale's own curvature, against fitting noise


@dataclass
class Grids:
    """Scales and zero points, float32 [N, G], and the group of each position, int64 [K]."""

    scales: Tensor
    zeros: Tensor
    group_of: Tensor

    @classmethod
    def empty(cls, rows: int, groups: int, group_of: Tensor) -> Grids:
        """Grids still to be chosen."""
        blank = torch.empty(rows, groups, device=group_of.device)
        return cls(blank, blank.clone(), group_of)

    def fixed(self, start: int, end: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """A `SpanGrid` of grids chosen before: each position has its own group."""
        groups = self.group_of[start:end]
        return self.scales[:, groups].t().contiguous(), self.zeros[:, groups].t().contiguous()

    def choosing(self, spec: WeightSpec, search: Search, importance: Tensor | None) -> SpanGrid:
        """A `SpanGrid` that chooses a group's grid when its first feature comes up, from the weights as corrected by
        then. Positions of one group follow each other.

        importance: float32 [K], what an error at each position costs, or None for all the same.
        """
        group = 0

        def grid(start: int, _end: int, rows: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal group
            if start % spec.group_size == 0:
                members = slice(start, min(start + spec.group_size, spec.in_features))
                costs = None if importance is None else importance[members]
                scale, zero = group_params(
                    rows[members].t(), spec.bits, spec.sym, spec.scale_dtype, search, costs
                )
                group = int(self.group_of[start])
                self.scales[:, group], self.zeros[:, group] = scale, zero
            return self.scales[None, :, group].contiguous(), self.zeros[None, :, group].contiguous()

        return grid

    def by_position(self) -> tuple[Tensor, Tensor]:
        """Scale and zero of every weight, [N, K] in rounding order."""
        return self.scales[:, self.group_of], self.zeros[:, self.group_of]


def group_spans(features: int, group_size: int, block_size: int) -> Iterator[tuple[int, int]]:
    """Runs of at most `block_size` positions that never cross a group's border."""
    for group in range(0, features, group_size):
        end = min(group + group_size, features)
        for start in range(group, end, block_size):
            yield start, min(start + block_size, end)


def round_columns(
    weight: Tensor, factor: Tensor, bits: int, spans: Iterable[tuple[int, int]], grid: SpanGrid
) -> Tensor:
    """Codes, as float32 integers [K, N] (transposed: a feature's codes in a row).

    weight: float32 [N, K] in the order of rounding. factor: float32 [K, K], the upper U with U'U = H^-1 in that order.
    Whatever lies behind a span is corrected by one matrix product when the span is done.
    """
    rows = weight.t().contiguous()
    codes = torch.empty_like(rows)
    round_span = _span_rounder(rows.device)
    for start, end in spans:
        scale, zero = grid(start, end, rows)
        codes[start:end], errors = round_span(
            rows[start:end], factor[start:end, start:end].contiguous(), scale, zero, bits
        )
        rows[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return codes


def _span_rounder(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    if device.type == "cpu":
        return round_span
    from woq.algorithms.rounding_triton import round_span as in_one_kernel

    return in_one_kernel


def round_span(
    rows: Tensor, u: Tensor, scale: Tensor, zero: Tensor, bits: int, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and errors, float32 [S, N], of one span: rows [S, N], u [S, S], scale and zero [S or 1, N].

        target[j] = rows[j] - sum_{i<j} u[i, j] error[i]        code[j] = the nearest to target[j]
        error[j] = (start[j] - its value) / u[j, j]             start is the target itself where None

    The loop looks left: a feature gathers the corrections of the span's earlier features when its turn comes, one
    matrix-vector product instead of a rank-one update of everything to its right.
    """
    pivots = u.diagonal().tolist()
    scales, zeros = scale.expand_as(rows), zero.expand_as(rows)
    codes, errors = torch.empty_like(rows), torch.zeros_like(rows)
    for j in range(len(rows)):
        target = torch.addmv(rows[j], errors[:j].t(), u[:j, j], alpha=-1) if j else rows[j]
        codes[j] = quantize(target, scales[j], zeros[j], bits)
        value = dequantize(codes[j], scales[j], zeros[j])
        errors[j] = ((target if start is None else start[j]) - value) / pivots[j]
    return codes, errors


def descend(
    weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, hessian: Tensor, bits: int, span: int = 128
) -> Tensor:
    """One sweep of coordinate descent on tr(D H D'), D = W_q - W, over codes [N, K]; never raises it.

    Each feature in turn takes the code that is best with all others as they stand (QuantEase, Behdin et al. 2023,
    https://arxiv.org/abs/2309.01885). weight, codes, scale, zero: [N, K]. hessian: [K, K], positive diagonal.
    """
    value = dequantize(codes, scale, zero)
    slope = ((value - weight) @ hessian).t().contiguous()  # half the gradient, [K, N]
    value, scales, zeros = (t.t().contiguous() for t in (value, scale, zero))
    result = torch.empty_like(slope)
    rounded = _span_rounder(slope.device)
    for start in range(0, len(slope), span):
        here = slice(start, min(start + span, len(slope)))
        pivots = hessian.diagonal()[here]
        pull = hessian[here, here] / pivots  # what a move of feature i does to the best place of feature j
        pull.fill_diagonal_(-1.0)
        best = value[here] - slope[here] / pivots.unsqueeze(1)
        result[here], moves = rounded(best, pull, scales[here], zeros[here], bits, value[here])
        slope.addmm_(hessian[:, here], moves)
    return result.t()


def best_scales(
    weight: Tensor, levels: Tensor, scales: Tensor, group_of: Tensor, hessian: Tensor, dtype: torch.dtype
) -> Tensor:
    """The scales [N, G] that minimise tr(D H D') with the codes frozen, rounded to `dtype`.

    A row's output is linear in its scales, so these are the normal equations of each row, [G, G], with a ridge towards
    the scales one has. weight, levels = code - zero: [N, K]. group_of: int64 [K]. A scale that would change its sign or
    by more than half is kept.
    """
    rows = max(1, _NORMAL_ELEMENTS // scales.shape[1] ** 2)
    parts = zip(weight.split(rows), levels.split(rows), scales.split(rows), strict=True)
    solved = torch.cat([_solve_rows(w, level, scale, group_of, hessian) for w, level, scale in parts])
    sound = ((solved / scales) - 1).abs() < 0.5  # false for NaN too
    return storable_scale(torch.where(sound, solved, scales), dtype)


def _solve_rows(weight: Tensor, levels: Tensor, scales: Tensor, group_of: Tensor, hessian: Tensor) -> Tensor:
    groups = scales.shape[1]
    member = torch.nn.functional.one_hot(group_of, groups).float()  # [K, G]
    right = (weight @ hessian * levels) @ member
    normal = torch.empty(len(weight), groups, groups, device=weight.device)
    for g in range(groups):
        columns = (group_of == g).nonzero().flatten()
        normal[:, g] = (levels[:, columns] @ hessian[columns] * levels) @ member
    diagonal = normal.diagonal(dim1=1, dim2=2)
    ridge = _RIDGE * diagonal + 1e-6 * diagonal.mean(1, keepdim=True) + 1e-20
    solved: Tensor = torch.linalg.solve(normal + torch.diag_embed(ridge), right + ridge * scales)
    return solved
