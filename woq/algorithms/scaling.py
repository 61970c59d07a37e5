"""What AWQ and TEQ share: input scales folded into what produces the inputs, then rounding to nearest.

A linear that holds W s and is given x / s computes the same, but its groups round another matrix: features that matter
take more of a group's range. Scales are chosen for one fold at a time (`FoldFinder` says which there are), from
statistics that one run of the block gathers for all of them. Then every group is rounded to nearest, its range clipped
where that lowers the error of the output (`output_params`).

Statistics are second moments X'X of the inputs of linears, shared by the linears of one input. Blocks whose moments do
not fit `stages.MOMENT_BYTES` together are run several times.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from woq.algorithms.base import Algorithm, LayerResult, float_weight
from woq.algorithms.hessian import SecondMoment, relative_error
from woq.algorithms.rtn import round_to_nearest
from woq.algorithms.stages import stages, within_budget
from woq.blocks import Linear, linears, weight_of, write_back
from woq.configs.base import FoldingConfig
from woq.folds import Fold, FoldFinder, Folds
from woq.quant import output_params, quantize
from woq.replay import BlockInputs, input_groups, observe
from woq.weights import QuantizedWeight, WeightSpec

ConfigT = TypeVar("ConfigT", bound=FoldingConfig)

_RIDGE = 0.01  # share of the mean diagonal added to a moment: what calibration never excites is not clipped for free


@dataclass(frozen=True, eq=False)
class Consumer:
    """A linear behind a fold: its float32 weight [N, K], the mean second moment [K, K] of its inputs, its spec."""

    weight: Tensor
    moment: Tensor
    spec: WeightSpec


class InputScaling(Algorithm[ConfigT]):
    """See the module's head. Children choose the scales."""

    needs_data: ClassVar[bool] = True

    def __init__(self, config: ConfigT) -> None:
        super().__init__(config)
        self.finder = FoldFinder(config.absorb_layer_dict)

    @property
    def scales_inputs(self) -> bool:
        """Whether inputs are scaled at all."""
        return True

    @property
    def clips(self) -> bool:
        """Whether ranges of groups are clipped."""
        return True

    @abstractmethod
    def scale(self, fold: Fold, consumers: Sequence[Consumer]) -> Tensor:
        """float32 [fold.channels] > 0. `consumers` are those that will be quantized and were reached by a token."""

    def improve(
        self,
        block: nn.Module,
        specs: Mapping[str, WeightSpec],
        inputs: BlockInputs,
        scales: list[tuple[Fold, Tensor]],
        moments: Mapping[str, SecondMoment],
    ) -> list[tuple[Fold, Tensor]]:
        """A last word on all scales of a block together, before any is applied. `moments`: those that are at hand."""
        return scales

    def quantize_block(
        self, block: nn.Module, specs: Mapping[str, WeightSpec], inputs: BlockInputs | None
    ) -> dict[str, LayerResult]:
        assert inputs is not None  # the quantize loop gives data to whoever needs it
        modules = linears(block)
        groups = input_groups(block, list(specs), inputs)
        folds = self._folds(block, specs, inputs)
        in_turn = stages(self.config, groups)
        runs = _runs(groups, folds, specs)
        scales: list[tuple[Fold, Tensor]] = []
        moments: dict[str, SecondMoment] = {}
        for run in runs:
            moments = _observe(block, run, specs, inputs)
            scales += [(f, self._scale(f, modules, moments, specs)) for f in folds.kept if _inside(f, run)]
        for fold, s in self.improve(block, specs, inputs, scales, moments):
            _rescale(moments, fold, fold.apply(block, s))
        results: dict[str, LayerResult] = {}
        for stage in in_turn:
            fresh: dict[str, LayerResult] = {}
            for run in within_budget([[group] for group in stage], specs):
                if len(in_turn) > 1 or len(runs) > 1:
                    moments = _observe(block, run, specs, inputs)
                fresh |= self._round(run, modules, moments, specs, folds.refused)
            for name, result in fresh.items():  # later stages see what earlier ones were rounded to
                write_back(modules[name], result.weight.dequantize())
            results |= fresh
        return {name: results[name] for name in specs}

    def _folds(self, block: nn.Module, specs: Mapping[str, WeightSpec], inputs: BlockInputs) -> Folds:
        if not self.scales_inputs:
            return Folds((), {})
        if not self.config.folding:
            return Folds((), dict.fromkeys(specs, "folding=False"))
        return self.finder.find(block, list(specs), inputs)

    def _scale(
        self,
        fold: Fold,
        modules: Mapping[str, Linear],
        moments: Mapping[str, SecondMoment],
        specs: Mapping[str, WeightSpec],
    ) -> Tensor:
        consumers = [
            Consumer(float_weight(n, weight_of(modules[n])), moments[n].normalized(), specs[n])
            for n in fold.consumers
            if n in specs and moments[n].tokens
        ]
        return (
            self.scale(fold, consumers) if consumers else torch.ones(fold.channels, device=fold.source.device)
        )

    def _round(
        self,
        run: Iterable[tuple[str, ...]],
        modules: Mapping[str, Linear],
        moments: Mapping[str, SecondMoment],
        specs: Mapping[str, WeightSpec],
        refused: Mapping[str, str],
    ) -> dict[str, LayerResult]:
        results = {}
        for name in (name for group in run for name in group):
            weight = float_weight(name, weight_of(modules[name]))
            tokens, moment = moments[name].tokens, moments[name].normalized()
            notes = [f"input not scaled: {refused[name]}"] if name in refused else []
            if not tokens:
                notes = ["no calibration token reached it: rounded to nearest"]
                quantized = round_to_nearest(weight, specs[name], "mse" if self.clips else "minmax")
            else:
                quantized = round_by_output(weight, specs[name], moment if self.clips else None)
            loss = relative_error(weight, quantized.dequantize(), moment)
            results[name] = LayerResult(quantized, loss, tokens, note="; ".join(notes))
        return results


def round_by_output(weight: Tensor, spec: WeightSpec, moment: Tensor | None) -> QuantizedWeight:
    """Nearest codes for float32 `weight` [N, K] on the grids that `output_params` chooses for each group.

    moment: float32 [K, K], mean second moment of the inputs; None: every group's whole range.
    """
    if moment is None:
        return round_to_nearest(weight, spec, "minmax")
    ridge = _RIDGE * moment.diagonal().mean() * torch.eye(spec.group_size, device=moment.device)
    codes, scales, zeros = [], [], []
    for start in range(0, spec.in_features, spec.group_size):
        members = slice(start, min(start + spec.group_size, spec.in_features))
        own = moment[members, members]
        group = weight[:, members].contiguous()
        scale, zero = output_params(
            group, own + ridge[: len(own), : len(own)], spec.bits, spec.sym, spec.scale_dtype
        )
        codes.append(quantize(group, scale.unsqueeze(-1), zero.unsqueeze(-1), spec.bits).to(torch.uint8))
        scales.append(scale.to(spec.scale_dtype))
        zeros.append(zero.to(torch.uint8))
    return QuantizedWeight(spec, torch.cat(codes, 1), torch.stack(scales, 1), torch.stack(zeros, 1))


# --- statistics -------------------------------------------------------------------------------------------------------


def _runs(
    groups: Sequence[tuple[str, ...]], folds: Folds, specs: Mapping[str, WeightSpec]
) -> list[list[tuple[str, ...]]]:
    """Groups whose moments are gathered in one run of the block; those of one fold stay together."""
    fold_of = {name: i for i, fold in enumerate(folds.kept) for name in fold.consumers}
    together: dict[object, list[tuple[str, ...]]] = {}
    for group in groups:
        together.setdefault(next((fold_of[n] for n in group if n in fold_of), group), []).append(group)
    return within_budget(together.values(), specs)


def _inside(fold: Fold, run: Iterable[tuple[str, ...]]) -> bool:
    return any(name in group for group in run for name in fold.consumers)


def _observe(
    block: nn.Module,
    run: Sequence[tuple[str, ...]],
    specs: Mapping[str, WeightSpec],
    inputs: BlockInputs,
) -> dict[str, SecondMoment]:
    """The moments of a run's groups, by linear; those of one input are one object."""
    firsts = {g[0]: SecondMoment.zeros(specs[g[0]].in_features, inputs.device) for g in run}
    observe(block, list(firsts), inputs, lambda name, x: firsts[name].add(name, x))
    return {name: firsts[group[0]] for group in run for name in group}


def _rescale(moments: Mapping[str, SecondMoment], fold: Fold, s: Tensor) -> None:
    """What the moments are once `s` is folded: of x / s."""
    features = s[fold.source]
    for moment in {id(moments[n]): moments[n] for n in fold.consumers if n in moments}.values():
        moment.upper /= features.unsqueeze(1) * features
