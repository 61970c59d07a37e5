"""Rounding a weight feature by feature with error feedback, and the grids that features are rounded on.

The order of features is the caller's: everything here is in rounding order, "position" counts in it. A span is a run
of positions inside one group; spans go one after the other, and inside a span every output row is independent of the
others, so that a GPU rounds a span in one kernel (`rounding_triton.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from woq.algorithms.kernels import search_group, span_functions
from woq.algorithms.products import product
from woq.phases import phase
from woq.quant import Search, dequantize, storable_scale
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
        groups = self.group_of[:: spec.group_size].tolist()
        scale = zero = self.scales[:, 0]

        def grid(start: int, _end: int, rows: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal scale, zero
            if start % spec.group_size == 0:
                members = slice(start, min(start + spec.group_size, spec.in_features))
                costs = None if importance is None else importance[members]
                with phase("search"):
                    scale, zero = search_group(
                        rows[members], spec.bits, spec.sym, spec.scale_dtype, search, costs
                    )
                group = groups[start // spec.group_size]
                self.scales[:, group], self.zeros[:, group] = scale, zero
            return scale.unsqueeze(0), zero.unsqueeze(0)

        return grid

    def by_position(self) -> tuple[Tensor, Tensor]:
        """Scale and zero of every weight, [N, K] in rounding order; a feature's stand next to each other, as codes do."""
        return self.scales.t()[self.group_of].t(), self.zeros.t()[self.group_of].t()


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
    in_span, _ = span_functions(rows.device)
    for start, end in spans:
        scale, zero = grid(start, end, rows)
        errors = in_span(rows[start:end], factor[start:end, start:end], scale, zero, bits, codes[start:end])
        rows[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return codes


def round_span(rows: Tensor, u: Tensor, scale: Tensor, zero: Tensor, bits: int, codes: Tensor) -> Tensor:
    """Round one span; its errors [S, N]. rows [S, N], u [S, S], scale and zero [S or 1, N]; codes [S, N] are written.

    target[j] = rows[j] - sum_{i<j} u[i, j] error[i]        code[j] = the nearest to target[j]
    error[j] = (target[j] - its value) / u[j, j]
    """
    return _in_turn(rows, u, scale, zero, bits, None, codes)


def descend_span(
    value: Tensor, slope: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, bits: int, codes: Tensor
) -> Tensor:
    """Move one span's features [S, N] to the codes that are best for each in turn; by how much they moved, [S, N].

    value, slope: what they are and half the gradient there. hessian: the span's part [S, S]. codes [S, N] are written.
    """
    pivots = hessian.diagonal()
    pull = hessian / pivots  # what a move of feature i does to the best place of feature j
    pull.fill_diagonal_(-1.0)
    return _in_turn(value - slope / pivots.unsqueeze(1), pull, scale, zero, bits, value, codes)


def _in_turn(
    rows: Tensor, u: Tensor, scale: Tensor, zero: Tensor, bits: int, start: Tensor | None, codes: Tensor
) -> Tensor:
    """`round_span`, with error[j] = (start[j] - its value) / u[j, j] where there is a `start`.

    The loop looks left: a feature gathers the corrections of the span's earlier features when its turn comes, one
    matrix-vector product instead of a rank-one update of everything to its right.
    """
    top = (1 << bits) - 1
    follow = u / u.diagonal().unsqueeze(1)  # errors are divided by their pivots in the end, all at once
    scales, lowest = scale.expand_as(rows), (-zero).expand_as(rows)
    highest = lowest + top
    levels, errors, level = torch.empty_like(rows), torch.empty_like(rows), torch.empty_like(rows[0])
    for j in range(len(rows)):
        target = torch.addmv(rows[j], errors[:j].t(), follow[:j, j], alpha=-1) if j else rows[0]
        torch.div(target, scales[j], out=level).round_()
        torch.clamp(level, lowest[j], highest[j], out=levels[j])
        # what stands in its place less what it was to be
        torch.addcmul(target if start is None else start[j], levels[j], scales[j], value=-1, out=errors[j])
    torch.sub(levels, lowest, out=codes)
    return errors.div_(u.diagonal().unsqueeze(1))


def descend(
    weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, hessian: Tensor, bits: int, span: int = 128
) -> Tensor:
    """One sweep of coordinate descent on tr(D H D'), D = W_q - W, over codes [N, K]; never raises it.

    Each feature in turn takes the code that is best with all others as they stand (QuantEase, Behdin et al. 2023,
    https://arxiv.org/abs/2309.01885). weight, codes, scale, zero: [N, K]. hessian: [K, K], positive diagonal.
    """
    codes, scale, zero = (t.t().contiguous() for t in (codes, scale, zero))
    value = dequantize(codes, scale, zero)
    slope = product(hessian, value - weight.t())  # half the gradient, [K, N]
    _, in_span = span_functions(slope.device)
    result = torch.empty_like(slope)
    for start in range(0, len(slope), span):
        end = min(start + span, len(slope))
        here = slice(start, end)
        moves = in_span(
            value[here], slope[here], hessian[here, here], scale[here], zero[here], bits, result[here]
        )
        slope[end:].addmm_(hessian[end:, here], moves)
    return result.t()


def best_scales(
    response: Tensor, levels: Tensor, scales: Tensor, group_of: Tensor, hessian: Tensor, dtype: torch.dtype
) -> Tensor:
    """The scales [N, G] that minimise tr(D H D') with the codes frozen, rounded to `dtype`.

    A row's output is linear in its scales, so these are the normal equations of each row, [G, G], with a ridge towards
    the scales one has. response: [N, K], the weight times `hessian`. levels = code - zero: [N, K]. group_of: int64 [K]. A scale that would change its sign or
    by more than half is kept.
    """
    # One group's features next to each other: already so, but where groups were fixed before features were ordered.
    owners = group_of.tolist()
    runs = [owner for i, owner in enumerate(owners) if not i or owner != owners[i - 1]]
    if len(runs) > scales.shape[1]:
        order = torch.argsort(group_of, stable=True)
        response, levels, hessian = response[:, order], levels[:, order], hessian[order][:, order]
        owners = group_of[order].tolist()
        runs = list(range(scales.shape[1]))
    counts = Counter(owners)
    sizes = [counts[run] for run in runs]
    at = torch.tensor(runs, device=scales.device)
    rows = max(1, _NORMAL_ELEMENTS // scales.shape[1] ** 2)
    levels = levels.contiguous()
    parts = zip(response.split(rows), levels.split(rows), scales[:, at].split(rows), strict=True)
    solved = torch.empty_like(scales)
    solved[:, at] = torch.cat([_solve_rows(r, level, scale, sizes, hessian) for r, level, scale in parts])
    sound = ((solved / scales) - 1).abs() < 0.5  # false for NaN too
    return storable_scale(torch.where(sound, solved, scales), dtype)


def _solve_rows(
    response: Tensor, levels: Tensor, scales: Tensor, sizes: Sequence[int], hessian: Tensor
) -> Tensor:
    """Scales [N, G] of groups of `sizes` features, which follow each other."""
    size, groups = max(sizes), len(sizes)

    def by_group(x: Tensor, first: int = 0) -> Tensor:
        """Sums [N, G - first] over the features of each group, x [N, K] beginning with group `first`."""
        if sizes[first:] == [size] * (groups - first):
            return x.view(len(x), -1, size).sum(-1)
        return torch.stack([part.sum(1) for part in x.split(sizes[first:], 1)], 1)

    right = by_group(response * levels)
    normal = torch.zeros(len(levels), groups, groups, device=levels.device)
    start = 0
    for g, own in enumerate(sizes):  # the upper half; the matrix is symmetric
        here = product(levels[:, start : start + own], hessian[start : start + own, start:], whole=True)
        normal[:, g, g:] = by_group(here.mul_(levels[:, start:]), g)
        start += own
    diagonal = normal.diagonal(dim1=1, dim2=2)
    ridge = _RIDGE * diagonal + 1e-6 * diagonal.mean(1, keepdim=True) + 1e-20
    normal = normal.triu() + normal.triu(1).mT + torch.diag_embed(ridge)
    solved: Tensor = torch.linalg.solve(normal, right + ridge * scales)
    return solved
