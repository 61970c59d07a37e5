"""TEQ: AWQ's input scales, trained by gradient on the block's output.

Cheng et al. 2023, https://arxiv.org/abs/2310.10944. The logarithms of all scales of a block are trained together with
Adam: a linear's weight W becomes Q(W s) / s, which is what the fold will make of it, so that the block runs as it is
and no parameter is touched before the end. Rounding passes gradients straight through; a group's scale moves with the
extent of its weights, by the share that clipping chose when it was last searched. The loss is the squared error of the
block's output.

Differences from the paper's code, each for a reason:
- Training starts from AWQ's search, not from ones: better, in fewer steps (docs/folds.md).
- Steps are judged on samples that are not trained on, rounded as they will be, and the best is kept; s = 1 is one of
  them. (On the grids of the step before, every later step looks worse: ranges were searched for other weights.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from woq.algorithms.awq import search_scale
from woq.algorithms.hessian import SecondMoment
from woq.algorithms.scaling import Consumer, InputScaling, round_by_output
from woq.blocks import Linear, linears, weight_of
from woq.configs import TeqConfig
from woq.folds import Fold
from woq.replay import BlockCall, BlockInputs, call_block, forward_batch, run_batch, select
from woq.weights import WeightSpec

_LR = 1e-2  # of log s: about a percent a step
_STEP_TOKENS = 512  # trained on in a step, and
_HELD_OUT_TOKENS = 2048  # judged on
_CHECKS = 2  # times, beside the start, that weights are rounded anew and the held-out error is looked at

Scales = list[tuple[Fold, Tensor]]


class Teq(InputScaling[TeqConfig]):
    """See the module's head."""

    def scale(self, fold: Fold, consumers: Sequence[Consumer]) -> Tensor:
        return search_scale(fold, consumers, self.clips)

    def improve(
        self,
        block: nn.Module,
        specs: Mapping[str, WeightSpec],
        inputs: BlockInputs,
        scales: Scales,
        moments: Mapping[str, SecondMoment],
    ) -> Scales:
        if not scales or self.config.iters == 0:
            return scales
        data = _Data(block, inputs, self.config.seed)
        problem = _Problem(block, specs, scales, moments)
        trained = _train(problem, data, self.config.iters, self.config.lr or _LR)
        return [(fold, s) for (fold, _), s in zip(scales, trained, strict=True)]


def _train(problem: _Problem, data: _Data, iters: int, lr: float) -> list[Tensor]:
    """The scales with the smallest held-out error, rounded as they will be: of no scaling and of every check."""
    logs = [s.log().requires_grad_() for _, s in problem.scales]
    optimizer = torch.optim.Adam(logs, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / iters)
    best = [torch.ones_like(s) for _, s in problem.scales]
    smallest = data.error(problem.block, problem.round(best))
    checks = {round(i * iters / _CHECKS) for i in range(_CHECKS + 1)}
    for step in range(iters + 1):
        now = [log.detach().exp() for log in logs]
        if step in checks:
            error = data.error(problem.block, problem.round(now))
            if error < smallest:
                best, smallest = now, error
        if step < iters:
            optimizer.zero_grad()
            with torch.enable_grad():
                weights = problem.fake_quantized([log.exp() for log in logs])
                data.loss(problem.block, weights).backward()
            optimizer.step()
            schedule.step()
    return best


# --- weights as functions of the scales -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Grid:
    """Of every group, [N, G, 1]: the scale's share of the extent (largest minus smallest weight), and the zero point."""

    share: Tensor
    zero: Tensor


class _Problem:
    """A block's quantized linears, and their weights in terms of the scales."""

    def __init__(
        self,
        block: nn.Module,
        specs: Mapping[str, WeightSpec],
        scales: Scales,
        moments: Mapping[str, SecondMoment],
    ) -> None:
        self.block, self.specs, self.scales, self.moments = block, specs, scales, moments
        modules = linears(block)
        self.weights = {name: weight_of(modules[name]).float() for name in specs}
        self.fold_of = {n: i for i, (fold, _) in enumerate(scales) for n in fold.consumers if n in specs}
        self.grids: dict[str, _Grid] = {}
        self.fixed: dict[str, Tensor] = {}  # what no scale reaches

    def _features(self, name: str, scales: Sequence[Tensor]) -> Tensor | None:
        """The scale of each input feature, or None where the input is not scaled."""
        if name not in self.fold_of:
            return None
        index = self.fold_of[name]
        return scales[index][self.scales[index][0].source]

    def _scaled(self, name: str, scales: Sequence[Tensor]) -> Tensor:
        features = self._features(name, scales)
        return self.weights[name] if features is None else self.weights[name] * features

    @torch.no_grad()
    def round(self, scales: Sequence[Tensor]) -> dict[str, Tensor]:
        """The weights [N, K] as they will be stored, the scales taken out again; their grids are trained on from now."""
        result = {}
        for name, spec in self.specs.items():
            scaled, features = self._scaled(name, scales), self._features(name, scales)
            quantized = round_by_output(scaled, spec, self._moment(name, features))
            extent = _extent(_grouped(scaled, spec))
            share = quantized.scales.float().unsqueeze(-1) / extent
            self.grids[name] = _Grid(share, quantized.zeros.float().unsqueeze(-1))
            weight = quantized.dequantize()
            result[name] = weight if features is None else weight / features
        self.fixed = {name: weight for name, weight in result.items() if name not in self.fold_of}
        return result

    def _moment(self, name: str, features: Tensor | None) -> Tensor | None:
        """Of the scaled inputs; None where calibration knows nothing of them."""
        if name not in self.moments or not self.moments[name].tokens:
            return None
        moment = self.moments[name].normalized()
        return moment if features is None else moment / (features.unsqueeze(1) * features)

    def fake_quantized(self, scales: Sequence[Tensor]) -> dict[str, Tensor]:
        """As `round`, on grids that move with the weights: differentiable."""
        return self.fixed | {name: self._fake_quantized(name, scales) for name in self.fold_of}

    def _fake_quantized(self, name: str, scales: Sequence[Tensor]) -> Tensor:
        spec, grid = self.specs[name], self.grids[name]
        features, groups = self._features(name, scales), _grouped(self._scaled(name, scales), spec)
        step = grid.share * _extent(groups)
        position = groups / step
        codes = position + (position.round() - position).detach()  # gradients pass straight through
        codes = codes.clamp(-grid.zero, (1 << spec.bits) - 1 - grid.zero)
        weight = (codes * step).flatten(1)[:, : spec.in_features]
        return weight if features is None else weight / features


def _grouped(weight: Tensor, spec: WeightSpec) -> Tensor:
    """[N, G, gs], a short last group filled up with zeros."""
    fill = spec.groups * spec.group_size - spec.in_features
    return nn.functional.pad(weight, (0, fill)).view(-1, spec.groups, spec.group_size)


def _extent(groups: Tensor) -> Tensor:
    return (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)).clamp(min=1e-8)


# --- the block on data ------------------------------------------------------------------------------------------------


class _Data:
    """What the float block returns, for samples to train on and samples to judge by."""

    def __init__(self, block: nn.Module, inputs: BlockInputs, seed: int) -> None:
        self.inputs = inputs
        self.targets = [
            run_batch(block, inputs, i).to(inputs.hidden[i].device) for i in range(len(inputs.hidden))
        ]
        samples = [(i, row) for i, hidden in enumerate(inputs.hidden) for row in range(len(hidden))]
        length = inputs.hidden[0].shape[1]
        held = min(max(1, len(samples) // 8), max(1, _HELD_OUT_TOKENS // length))
        self.held_out = samples[-held:]
        self.training = samples[:-held] or samples  # one sample alone is both
        self.per_step = max(1, _STEP_TOKENS // length)
        self.random = torch.Generator().manual_seed(seed)

    def loss(self, block: nn.Module, weights: Mapping[str, Tensor]) -> Tensor:
        """Mean squared error on a few samples of one batch, drawn at random."""
        batch = self.training[int(torch.randint(len(self.training), (1,), generator=self.random))][0]
        rows = [row for i, row in self.training if i == batch]
        chosen = torch.randperm(len(rows), generator=self.random)[: self.per_step]
        return self._error(block, weights, batch, [rows[k] for k in chosen.tolist()])

    @torch.no_grad()
    def error(self, block: nn.Module, weights: Mapping[str, Tensor]) -> float:
        """Mean squared error on the held-out samples."""
        batches = dict.fromkeys(i for i, _ in self.held_out)
        parts = [self._error(block, weights, b, [r for i, r in self.held_out if i == b]) for b in batches]
        return float(torch.stack(parts).mean())

    def _error(self, block: nn.Module, weights: Mapping[str, Tensor], batch: int, rows: list[int]) -> Tensor:
        part = select(self.inputs, batch, rows)
        target, mask = self.targets[batch], part.masks[0]
        output = forward_batch(block, part, 0, _calling_with(block, weights))
        difference = (
            output.float() - target[rows if len(output) < len(target) else slice(None)].to(output).float()
        )
        return (
            difference.square().mean() if mask is None else difference[mask.to(output.device)].square().mean()
        )


def _calling_with(block: nn.Module, weights: Mapping[str, Tensor]) -> Any:
    """`call_block` with other weights [N, K] in place of the linears' own."""
    modules = linears(block)
    named = {f"{name}.weight": _stored_as(modules[name], weight) for name, weight in weights.items()}

    def call(_: nn.Module, hidden: Tensor, own: BlockCall) -> Any:
        return torch.func.functional_call(
            _Callable(block), {f"block.{n}": w for n, w in named.items()}, (hidden, own)
        )

    return call


class _Callable(nn.Module):
    """`call_block` as a module, for `functional_call`."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor, call: BlockCall) -> Any:
        return call_block(self.block, hidden, call)


def _stored_as(linear: Linear, weight: Tensor) -> Tensor:
    """`weight` [N, K] in the dtype and orientation of the linear's own."""
    return (weight if isinstance(linear, nn.Linear) else weight.t()).to(linear.weight.dtype)
