"""TEQ: the fake-quantized weights against what is stored, the training against searching alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.algorithms.test_awq import GROUP, Block, block_and_inputs
from tests.algorithms.test_gptq import spec_of
from woq.algorithms import build
from woq.algorithms.base import LayerResult
from woq.algorithms.hessian import SecondMoment
from woq.algorithms.teq import _Data, _Problem, _train
from woq.configs import TeqConfig
from woq.folds import FoldFinder
from woq.replay import BlockInputs, observe
from woq.weights import WeightSpec

NAMES = ("gate", "up", "down")


def specs_of(block: nn.Module, bits: int, sym: bool) -> dict[str, WeightSpec]:
    return {n: spec_of(block.get_submodule(n), bits, GROUP, sym=sym) for n in NAMES}  # type: ignore[arg-type]


def run(iters: int, bits: int = 3, sym: bool = False, **config: Any) -> tuple[Block, dict[str, LayerResult]]:
    block, inputs = block_and_inputs()
    settings = TeqConfig(bits=bits, sym=sym, group_size=GROUP, iters=iters, **config)
    results = build(settings).quantize_block(block, specs_of(block, bits, sym), inputs)
    return block, results


def problem_of(bits: int, sym: bool) -> tuple[_Problem, BlockInputs, list[Tensor]]:
    block, inputs = block_and_inputs()
    specs = specs_of(block, bits, sym)
    folds = FoldFinder({}).find(block, NAMES, inputs).kept
    torch.manual_seed(4)
    scales = [(fold, torch.rand(fold.channels) + 0.5) for fold in folds]
    moments = {n: SecondMoment.zeros(specs[n].in_features, inputs.device) for n in NAMES}
    observe(block, NAMES, inputs, lambda name, x: moments[name].add(name, x))
    return _Problem(block, specs, scales, moments), inputs, [s for _, s in scales]


@pytest.mark.parametrize(("bits", "sym"), [(4, True), (2, False)])
def test_what_is_trained_is_what_will_be_stored(bits: int, sym: bool) -> None:
    """At the start the differentiable weights are the rounded ones, and the block on them is the block with them."""
    problem, inputs, scales = problem_of(bits, sym)
    stored = problem.round(scales)
    trained = problem.fake_quantized(scales)
    for name in NAMES:
        assert torch.allclose(trained[name], stored[name], atol=1e-5 * float(stored[name].abs().max())), name
    data = _Data(problem.block, inputs, seed=0)
    by_call = data.error(problem.block, stored)
    with torch.no_grad():
        for name in NAMES:
            problem.block.get_submodule(name).weight.copy_(stored[name])  # type: ignore[operator, union-attr]
        batches = sorted({i for i, _ in data.held_out})
        plain = [(problem.block(inputs.hidden[i]) - data.targets[i]).square().mean() for i in batches]
    assert by_call == pytest.approx(float(torch.stack(plain).mean()), rel=1e-4)


def test_gradients_point_downhill() -> None:
    """A small step against the gradient lowers the error that rounding makes, averaged over several starts."""
    gained = 0.0
    problem, inputs, scales = problem_of(4, False)
    data = _Data(problem.block, inputs, seed=0)
    problem.round(scales)  # grids that were searched for none of the starts
    for start in range(6):
        torch.manual_seed(start)
        logs = [(torch.rand_like(s) - 0.5).requires_grad_() for s in scales]
        before = data._error(problem.block, problem.fake_quantized([x.exp() for x in logs]), 0, [0])
        before.backward()
        with torch.no_grad():
            after = [(x - 0.05 * x.grad / x.grad.abs().max()).exp() for x in logs if x.grad is not None]
            gained += float(before) - float(data._error(problem.block, problem.fake_quantized(after), 0, [0]))
    assert len(after) == len(scales)
    assert gained > 0


@pytest.mark.parametrize("sym", [True, False])
def test_training_beats_searching(sym: bool) -> None:
    """On the whole calibration data: 60 steps lower the block's error, on what was held out too."""
    errors = {}
    reference, inputs = block_and_inputs()
    for iters in (0, 60):
        block, results = run(iters, sym=sym)
        with torch.no_grad():
            parts = [float((block(h) - reference(h)).square().mean()) for h in inputs.hidden]
        errors[iters] = (sum(parts), parts[-1])
        assert results.keys() == set(NAMES)
    assert errors[60][1] <= errors[0][1]  # where training finds nothing better it leaves what there was
    assert sym or errors[60][0] < 0.95 * errors[0][0]


def test_scales_that_are_no_better_than_none_are_not_kept() -> None:
    problem, inputs, _ = problem_of(3, False)
    problem.scales = [(fold, torch.exp(4 * torch.randn(fold.channels))) for fold, _ in problem.scales]
    kept = _train(problem, _Data(problem.block, inputs, 0), 2, 1e-3)
    assert all(torch.equal(s, torch.ones_like(s)) for s in kept)


def test_the_seed_decides() -> None:
    once, again, other = (run(60, seed=seed)[0].norm.weight for seed in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
