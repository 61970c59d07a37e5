"""GPTQ: round one input feature at a time and let the features not yet rounded absorb the error.

Frantar et al. 2022, https://arxiv.org/abs/2210.17323. With H = X'X the layer's input second moment and U the upper
factor of its inverse (H^-1 = U'U), rounding feature i with error e moves feature j > i by -e U[i,j] / U[i,i].

Differences from the paper's code, each for a reason:
- Linears that share an input share H, U and the column loop: they are rounded as one tall matrix.
- U comes from one Cholesky factorisation of H in reversed order and a triangular inverse, where the usual chain
  (factor, invert, factor again) rounds three times.
- The loop looks left: feature i gathers the corrections of its block when its turn comes, one matrix-vector product
  instead of a rank-one update of everything to its right.
- Features that no token ever excites keep their own weight; the paper's code zeroes them, which is wrong
  for every input the calibration data did not contain.
- Damping climbs a ladder, each step in float32 and then float64; a group that still cannot be factored is rounded to
  nearest and says so.

Orders: as stored; `desc_act`, most excited features first (groups then need a g_idx at run time); `desc_act` with
`static_groups`, groups as stored and their grids chosen before any rounding; `act_group_aware`, whole groups most
excited first and features sorted inside each, which needs no g_idx.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from woq.algorithms.base import Algorithm, LayerResult, float_weight
from woq.algorithms.hessian import SecondMoment, factor_with_ladder, relative_error
from woq.algorithms.rtn import round_to_nearest
from woq.blocks import linears, weight_of, write_back
from woq.configs import GPTQConfig
from woq.quant import Search, dequantize, group_params, quantize
from woq.replay import BlockInputs, input_groups, observe
from woq.weights import QuantizedWeight, WeightSpec

# (first feature, float32 [N, columns]: the weights from there on as corrected so far) -> scale, zero, each [N]
Params = Callable[[int, Tensor], tuple[Tensor, Tensor]]


def _spans(features: int, group_size: int, block_size: int) -> Iterator[tuple[int, int]]:
    """Runs of at most `block_size` features that never cross a group's border."""
    for group in range(0, features, group_size):
        end = min(group + group_size, features)
        for start in range(group, end, block_size):
            yield start, min(start + block_size, end)


def round_columns(
    weight: Tensor, factor: Tensor, bits: int, spans: Iterator[tuple[int, int]], params: Params
) -> tuple[Tensor, Tensor]:
    """The column loop: codes and dequantized weight, both float32 [K, N] (transposed: a feature's weights in a row).

    weight: float32 [N, K] in the order of rounding. factor: U of `inverse_factor` in that order.
    params: called for every feature when its turn comes.
    """
    rows = weight.t().contiguous()
    codes = torch.empty_like(rows)
    rounded = torch.empty_like(rows)
    for start, end in spans:
        u = factor[start:end, start:end]
        pivots = u.diagonal().tolist()
        errors = rows.new_zeros(end - start, rows.shape[1])
        for j in range(end - start):
            i = start + j
            scale, zero = params(i, rows)
            w = torch.addmv(rows[i], errors[:j].t(), u[:j, j], alpha=-1) if j else rows[i]
            codes[i] = quantize(w, scale, zero, bits)
            rounded[i] = dequantize(codes[i], scale, zero)
            errors[j] = (w - rounded[i]) / pivots[j]
        rows[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return codes, rounded


@dataclass
class Grids:
    """Scales and zero points [N, G] of one rounding run, and how a feature finds its own.

    group_of: for each position in rounding order, the group it belongs to.
    """

    scales: Tensor
    zeros: Tensor
    group_of: list[int]

    def at(self, position: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The grid of the feature at `position`."""
        group = self.group_of[position]
        return self.scales[:, group], self.zeros[:, group]


class Gptq(Algorithm[GPTQConfig]):
    """See the module's head."""

    needs_data: ClassVar[bool] = True

    def __init__(self, config: GPTQConfig) -> None:
        super().__init__(config)
        self.search: Search = "minmax" if config.search == "minmax" else "mse"

    def quantize_block(
        self, block: nn.Module, specs: Mapping[str, WeightSpec], inputs: BlockInputs | None
    ) -> dict[str, LayerResult]:
        assert inputs is not None  # the quantize loop gives data to whoever needs it
        groups = input_groups(block, list(specs), inputs)
        passes = [[group] for group in groups] if self.config.true_sequential else [groups]
        results: dict[str, LayerResult] = {}
        for groups_now in passes:  # true_sequential: later linears see what earlier ones were rounded to
            results.update(self._one_pass(block, groups_now, specs, inputs))
        return {name: results[name] for name in specs}

    def _one_pass(
        self,
        block: nn.Module,
        groups: Sequence[tuple[str, ...]],
        specs: Mapping[str, WeightSpec],
        inputs: BlockInputs,
    ) -> dict[str, LayerResult]:
        modules = linears(block)
        moments = {g[0]: SecondMoment.zeros(specs[g[0]].in_features, inputs.device) for g in groups}
        observe(block, list(moments), inputs, lambda name, x: moments[name].add(name, x))
        results: dict[str, LayerResult] = {}
        for group in groups:
            moment = moments.pop(group[0])
            for names in _alike(group, specs):
                weights = [float_weight(name, weight_of(modules[name])) for name in names]
                results.update(self._quantize_alike(names, weights, specs, moment))
            for name in group:
                write_back(modules[name], results[name].weight.dequantize())
        return results

    def _quantize_alike(
        self,
        names: Sequence[str],
        weights: Sequence[Tensor],
        specs: Mapping[str, WeightSpec],
        moment: SecondMoment,
    ) -> dict[str, LayerResult]:
        """Linears of one input and one spec, rounded as one tall matrix."""
        hessian = moment.normalized()
        unexcited = hessian.diagonal() == 0
        hessian.diagonal()[unexcited] = 1.0  # decoupled from the rest: such a feature is rounded by itself
        tall, damping, note = torch.cat(list(weights)), None, ""
        spec = specs[names[0]]
        rounded = self._round(tall, spec, hessian) if moment.tokens else None
        if rounded is None:
            note = "no calibration token reached it" if not moment.tokens else "Hessian not positive definite"
            note += ": rounded to nearest"
        else:
            codes, scales, zeros, g_idx, damping = rounded
        results, row = {}, 0
        for name, weight in zip(names, weights, strict=True):
            own = specs[name]
            if rounded is None:
                quantized = round_to_nearest(weight, own, "mse")
            else:
                rows = slice(row, row + own.out_features)
                quantized = QuantizedWeight(own, codes[rows], scales[rows], zeros[rows], g_idx)
            row += own.out_features
            loss = relative_error(weight, quantized.dequantize(), hessian)
            results[name] = LayerResult(quantized, loss, moment.tokens, damping, note)
        return results

    def _round(
        self, weight: Tensor, spec: WeightSpec, hessian: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float] | None:
        """(codes uint8 [N, K], scales, zeros, g_idx, damping), or None where no damping makes H definite."""
        config = self.config
        order = self._order(hessian.diagonal(), spec.group_size)
        h = hessian if order is None else hessian[order][:, order]
        factored = factor_with_ladder(h, config.damp_percent)
        if factored is None:
            return None
        factor, damping = factored
        ordered = weight if order is None else weight[:, order]
        grids = self._grids(weight, spec, hessian.diagonal(), order)
        choose: Params = grids.at
        spans = _spans(spec.in_features, spec.group_size, config.block_size)
        if not (config.desc_act and config.static_groups):
            choose = self._choosing(grids, spec, h.diagonal())
        codes, _ = round_columns(ordered, factor, spec.bits, spans, choose)
        g_idx = None
        if order is not None:
            back = torch.argsort(order)
            codes = codes[back]
            if spec.desc_act:
                g_idx = (back // spec.group_size).to(torch.int32)
        return (
            codes.t().to(torch.uint8).contiguous(),
            grids.scales.to(spec.scale_dtype),
            grids.zeros.to(torch.uint8),
            g_idx,
            damping,
        )

    def _order(self, excitation: Tensor, group_size: int) -> Tensor | None:
        """int64 [K], the order of rounding, or None for the stored one."""
        if self.config.desc_act:
            return torch.argsort(excitation, descending=True, stable=True)
        if not self.config.act_group_aware:
            return None
        groups = list(excitation.split(group_size))
        short = [groups.pop()] if groups[-1].numel() < group_size else []  # a short last group stays last
        by_group = torch.argsort(
            torch.stack([g.mean() for g in groups]), descending=True, stable=True
        ).tolist()
        by_group += [len(groups)] * len(short)
        sorted_groups = [torch.argsort(g, descending=True, stable=True) for g in groups + short]
        return torch.cat([sorted_groups[g] + g * group_size for g in by_group])

    def _grids(self, weight: Tensor, spec: WeightSpec, excitation: Tensor, order: Tensor | None) -> Grids:
        """Static groups: all grids now, from the weight as it is. Otherwise empty ones, filled on the way."""
        positions = torch.arange(spec.in_features, device=weight.device)
        if self.config.desc_act and not self.config.static_groups:
            group_of = positions // spec.group_size  # groups are made in rounding order
        else:
            group_of = (positions if order is None else order) // spec.group_size
        if self.config.desc_act and self.config.static_groups:
            importance = excitation if self.config.search == "activation" else None
            nearest = round_to_nearest(weight, spec, self.search, importance)
            return Grids(nearest.scales.float(), nearest.zeros.float(), group_of.tolist())
        empty = weight.new_empty(weight.shape[0], spec.groups)
        return Grids(empty, empty.clone(), group_of.tolist())

    def _choosing(self, grids: Grids, spec: WeightSpec, excitation: Tensor) -> Params:
        """Choose each group's grid when its first feature comes up, from the weights as corrected by then."""
        weighted = self.config.search == "activation"

        def choose(position: int, rows: Tensor) -> tuple[Tensor, Tensor]:
            if position % spec.group_size == 0:
                members = slice(position, min(position + spec.group_size, spec.in_features))
                importance = excitation[members] if weighted else None
                scale, zero = group_params(
                    rows[members].t(), spec.bits, spec.sym, spec.scale_dtype, self.search, importance
                )
                group = grids.group_of[position]
                grids.scales[:, group], grids.zeros[:, group] = scale, zero
            return grids.at(position, rows)

        return choose


def _alike(group: Sequence[str], specs: Mapping[str, WeightSpec]) -> list[list[str]]:
    """Split linears of one input by everything that must agree for rounding them together."""
    parts: dict[tuple[object, ...], list[str]] = {}
    for name in group:
        spec = specs[name]
        parts.setdefault((spec.bits, spec.group_size, spec.sym, spec.desc_act, spec.scale_dtype), []).append(
            name
        )
    return list(parts.values())
