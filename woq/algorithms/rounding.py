"""Rounding a weight feature by feature with error feedback, and the grids that features are rounded on.

The order of features is the caller's: everything here is in rounding order, "position" counts in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from woq.quant import Search, dequantize, group_params, quantize
from woq.weights import WeightSpec

# (position, float32 [K, N]: the weights, corrected for all errors made so far from that position's span on)
# -> scale, zero, each [N]
Params = Callable[[int, Tensor], tuple[Tensor, Tensor]]


@dataclass
class Grids:
    """Scales and zero points, float32 [N, G], and the group of each position."""

    scales: Tensor
    zeros: Tensor
    group_of: list[int]

    @classmethod
    def empty(cls, rows: int, groups: int, group_of: list[int], device: torch.device) -> Grids:
        """Grids still to be chosen."""
        return cls(
            torch.empty(rows, groups, device=device), torch.empty(rows, groups, device=device), group_of
        )

    def at(self, position: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The grid of one position."""
        group = self.group_of[position]
        return self.scales[:, group], self.zeros[:, group]

    def choosing(self, spec: WeightSpec, search: Search, importance: Tensor | None) -> Params:
        """Choose each group's grid when its first feature comes up, from the weights as corrected by then.

        importance: float32 [K], what an error at each position costs, or None for all the same.
        """

        def params(position: int, rows: Tensor) -> tuple[Tensor, Tensor]:
            if position % spec.group_size == 0:
                members = slice(position, min(position + spec.group_size, spec.in_features))
                costs = None if importance is None else importance[members]
                scale, zero = group_params(
                    rows[members].t(), spec.bits, spec.sym, spec.scale_dtype, search, costs
                )
                group = self.group_of[position]
                self.scales[:, group], self.zeros[:, group] = scale, zero
            return self.at(position, rows)

        return params


def group_spans(features: int, group_size: int, block_size: int) -> Iterator[tuple[int, int]]:
    """Runs of at most `block_size` positions that never cross a group's border."""
    for group in range(0, features, group_size):
        end = min(group + group_size, features)
        for start in range(group, end, block_size):
            yield start, min(start + block_size, end)


def round_columns(
    weight: Tensor, factor: Tensor, bits: int, spans: Iterable[tuple[int, int]], params: Params
) -> Tensor:
    """Codes, as float32 integers [K, N] (transposed: a feature's codes in a row).

    weight: float32 [N, K] in the order of rounding. factor: float32 [K, K], the upper U with U'U = H^-1 in that order.
    Inside a span a feature gathers the corrections of the span's earlier features when its turn comes; whatever lies
    behind the span is corrected by one matrix product when the span is done.
    """
    rows = weight.t().contiguous()
    codes = torch.empty_like(rows)
    for start, end in spans:
        u = factor[start:end, start:end]
        pivots = u.diagonal().tolist()
        errors = rows.new_zeros(end - start, rows.shape[1])
        for j in range(end - start):
            i = start + j
            scale, zero = params(i, rows)
            w = torch.addmv(rows[i], errors[:j].t(), u[:j, j], alpha=-1) if j else rows[i]
            codes[i] = quantize(w, scale, zero, bits)
            errors[j] = (w - dequantize(codes[i], scale, zero)) / pivots[j]
        rows[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return codes
