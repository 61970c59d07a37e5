"""GPTQ: round one input feature at a time and let the features not yet rounded absorb the error.

Frantar et al. 2022, https://arxiv.org/abs/2210.17323. With H = X'X the layer's input second moment and U the upper
factor of its inverse (H^-1 = U'U), rounding feature i with error e moves feature j > i by -e U[i,j] / U[i,i].

Differences from the paper's code, each for a reason:
- Linears that share an input share H, U and the column loop: they are rounded as one tall matrix.
- U comes from one Cholesky factorisation of H in reversed order and a triangular inverse, where the usual chain
  (factor, invert, factor again) rounds three times.
- The loop looks left: feature i gathers the corrections of its block when its turn comes, one matrix-vector product
  instead of a rank-one update of everything to its right.
- Features that no token ever excites are rounded by themselves (damping alone stands on their diagonal); the paper's
  code zeroes them, which is wrong for every input the calibration data did not contain.
- A group's grid is searched for the least error weighted by 1 / U[i,i]^2, what an error in feature i costs once
  the features after it have absorbed what they can; the paper takes the range of the weights.
- Groups of linears are rounded one after the other, and each makes up for most of what the ones before, in this block
  and in earlier ones, have done to its inputs (`drift_correction`).
- After rounding, scales are solved for with the codes frozen and the codes swept once more by coordinate descent
  (`refine`).
- Damping climbs a ladder, each step in float32 and then float64; a group that still cannot be factored is rounded to
  nearest and says so.

Orders: as stored; `desc_act`, most excited features first (groups then need a g_idx at run time); `desc_act` with
`static_groups`, groups as stored and their grids chosen before any rounding; `act_group_aware`, whole groups most
excited first and features sorted inside each, which needs no g_idx.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from woq.algorithms.base import Algorithm, LayerResult, float_weight
from woq.algorithms.gathering import gathering
from woq.algorithms.hessian import (
    FEW_TOKENS,
    SecondMoment,
    factor_with_ladder,
    fill_up_rare_experts,
    make_up_for_drift,
    relative_errors,
)
from woq.algorithms.products import product
from woq.algorithms.rounding import (
    Grids,
    SpanGrid,
    best_scales,
    descend,
    group_spans,
    round_columns,
)
from woq.algorithms.rtn import round_to_nearest
from woq.algorithms.stages import stages, within_budget
from woq.blocks import Linear, linears, weight_of, write_back
from woq.configs import GPTQConfig
from woq.phases import phase
from woq.quant import Search, dequantize, quantize
from woq.replay import BlockInputs, input_groups
from woq.walk import walkers
from woq.weights import QuantizedWeight, WeightSpec


class Gptq(Algorithm[GPTQConfig]):
    """See the module's head."""

    needs_data: ClassVar[bool] = True

    def __init__(self, config: GPTQConfig) -> None:
        super().__init__(config)
        self.search: Search = "minmax" if config.search == "minmax" else "mse"
        self.threads = walkers()

    @property
    def needs_float_stream(self) -> bool:
        return self.config.drift_correction > 0

    @property
    def runs_float_stream(self) -> bool:
        return self.needs_float_stream

    def quantize_block(
        self, block: nn.Module, specs: Mapping[str, WeightSpec], inputs: BlockInputs | None
    ) -> dict[str, LayerResult]:
        assert inputs is not None  # the quantize loop gives data to whoever needs it
        modules = linears(block)
        results: dict[str, LayerResult] = {}
        groups = input_groups(block, list(specs), inputs)
        in_turn = stages(self.config, groups)
        with gathering(block, specs, in_turn, groups, inputs, self.threads) as gather:
            for stage in in_turn:
                fresh: dict[str, LayerResult] = {}
                for run in within_budget([[group] for group in stage], specs):
                    with phase("forward"):
                        moments = gather.moments(run)
                    fill_up_rare_experts(moments, run)
                    fresh.update(self._one_pass(modules, run, specs, moments))
                for name, result in fresh.items():  # later stages see what earlier ones were rounded to
                    write_back(modules[name], result.weight.dequantize())
                results.update(fresh)
            with phase("forward"):
                gather.finish()
        return {name: results[name] for name in specs}

    def _one_pass(
        self,
        modules: Mapping[str, Linear],
        groups: Sequence[tuple[str, ...]],
        specs: Mapping[str, WeightSpec],
        moments: dict[str, SecondMoment],
    ) -> dict[str, LayerResult]:
        results: dict[str, LayerResult] = {}
        for group in groups:
            moment = moments.pop(group[0])
            for names in _alike(group, specs):
                weights = [float_weight(name, weight_of(modules[name])) for name in names]
                results.update(self._quantize_alike(names, weights, specs, moment))
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
        tall, damping, note = torch.cat(list(weights)), None, ""
        spec = replace(specs[names[0]], out_features=len(tall))
        rounded = self._round(tall, spec, moment, hessian) if moment.tokens + moment.borrowed else None
        if rounded is not None and moment.borrowed:
            note = f"fewer than {FEW_TOKENS} calibration tokens reached it: filled up from the block's other experts"
        if rounded is None:
            note = "no calibration token reached it" if not moment.tokens else "Hessian not positive definite"
            note += ": rounded to nearest"
        else:
            codes, scales, zeros, g_idx, damping, gated = rounded
            note = "; ".join(part for part in (note, gated) if part)
        counts, found = [len(weight) for weight in weights], []
        for i, (name, weight) in enumerate(zip(names, weights, strict=True)):
            if rounded is None:
                found.append(round_to_nearest(weight, specs[name], "mse"))
            else:
                rows = slice(sum(counts[:i]), sum(counts[: i + 1]))
                found.append(QuantizedWeight(specs[name], codes[rows], scales[rows], zeros[rows], g_idx))
        with phase("loss"):
            dequantized = torch.cat([quantized.dequantize() for quantized in found])
            losses = relative_errors(tall, dequantized, hessian, counts)
        return {
            name: LayerResult(quantized, loss, moment.tokens, damping, note)
            for name, quantized, loss in zip(names, found, losses, strict=True)
        }

    def _round(
        self, weight: Tensor, spec: WeightSpec, moment: SecondMoment, hessian: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float, str] | None:
        """(codes uint8 [N, K], scales, zeros, g_idx, damping, remark), or None where no damping makes H definite."""
        config = self.config
        order = self._order(hessian.diagonal(), spec.group_size)
        with phase("factor"):
            factored = factor_with_ladder(hessian[order][:, order], config.damp_percent)
        if factored is None:
            return None
        factor, damping = factored
        with phase("drift"):
            weight = make_up_for_drift(weight, moment, factor, order, config.drift_correction)
        # What an error in feature i costs once later features have absorbed what they can: 1 / U[i,i]^2.
        importance = None
        if config.search == "activation":
            importance = factor.diagonal().square().reciprocal()
            # Calibration says nothing of a feature it never excites: it gets an average say in its group's grid.
            importance[hessian.diagonal()[order] == 0] = importance.mean()
        back = torch.argsort(order)
        if config.desc_act and config.static_groups:
            nearest = round_to_nearest(
                weight, spec, self.search, None if importance is None else importance[back]
            )
            grids = Grids(nearest.scales.float(), nearest.zeros.float(), order // spec.group_size)
            grid: SpanGrid = grids.fixed
        else:
            positions = torch.arange(spec.in_features, device=order.device) if spec.desc_act else order
            grids = Grids.empty(weight.shape[0], spec.groups, positions // spec.group_size)
            grid = grids.choosing(spec, self.search, importance)
        spans = group_spans(spec.in_features, spec.group_size, config.block_size)
        ordered = weight[:, order]
        with phase("round"):
            codes = round_columns(ordered, factor, spec.bits, spans, grid).t()
        in_order = hessian[order][:, order]
        codes = self._refine(ordered, codes, grids, in_order, spec)
        with phase("gate"):
            codes, remark = or_nearest(ordered, codes, *grids.by_position(), in_order, spec.bits)
        return (
            codes[:, back].to(torch.uint8).contiguous(),
            grids.scales.to(spec.scale_dtype),
            grids.zeros.to(torch.uint8),
            (back // spec.group_size).to(torch.int32) if spec.desc_act else None,
            damping,
            remark,
        )

    def _refine(
        self, weight: Tensor, codes: Tensor, grids: Grids, hessian: Tensor, spec: WeightSpec
    ) -> Tensor:
        """Better codes, and in `grids` better scales, by the second moment itself: damping has done its work."""
        hessian = hessian + torch.diag(hessian.diagonal().mean() * 1e-6 + (hessian.diagonal() == 0).float())
        response = product(weight, hessian) if self.config.refine else weight
        for _ in range(self.config.refine):
            _, zero = grids.by_position()
            with phase("scales"):
                grids.scales = best_scales(
                    response, codes - zero, grids.scales, grids.group_of, hessian, spec.scale_dtype
                )
            with phase("descent"):
                codes = descend(weight, codes, *grids.by_position(), hessian, spec.bits)
        return codes

    def _order(self, excitation: Tensor, group_size: int) -> Tensor:
        """int64 [K], the order of rounding: most excited first, over all features or group by group."""
        features = torch.arange(len(excitation), device=excitation.device)
        if self.config.desc_act:
            return torch.argsort(excitation, descending=True, stable=True)
        if not self.config.act_group_aware:
            return features
        groups = list(torch.split(excitation, group_size))
        means = torch.stack([group.mean() for group in groups])
        if len(groups[-1]) < group_size:
            means[-1] = -1.0  # a short last group stays last, so that groups begin at multiples of their size
        by_group = torch.argsort(means, descending=True, stable=True).tolist()
        inside = [torch.argsort(group, descending=True, stable=True) for group in groups]
        return torch.cat([inside[g] + g * group_size for g in by_group])


def or_nearest(
    weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, hessian: Tensor, bits: int
) -> tuple[Tensor, str]:
    """`codes`, or the nearest ones on the same grid where those have the smaller tr(D H D'); and a remark if so.

    Rounding with feedback that ends up worse than without has gone wrong, on an ill-conditioned `hessian` or in a kernel:
    the result is never worse than the simple one. All [N, K], hessian [K, K].
    """
    nearest = quantize(weight, scale, zero, bits)

    def error(tried: Tensor) -> Tensor:
        difference = dequantize(tried, scale, zero) - weight
        return (product(difference, hessian) * difference).sum()

    both = torch.stack([error(codes), error(nearest)]).tolist()
    if both[0] <= both[1]:  # false for NaN too
        return codes, ""
    return nearest, f"error feedback came to {both[0]:.3g}, rounding to nearest to {both[1]:.3g}: the latter"


def _alike(group: Sequence[str], specs: Mapping[str, WeightSpec]) -> list[list[str]]:
    """Split linears of one input by everything that must agree for rounding them together."""
    parts: dict[tuple[object, ...], list[str]] = {}
    for name in group:
        spec = specs[name]
        parts.setdefault((spec.bits, spec.group_size, spec.sym, spec.desc_act, spec.scale_dtype), []).append(
            name
        )
    return list(parts.values())
