"""AWQ: the scale search and the clipping against plain loops, and what it does to a block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.algorithms.test_gptq import correlated, spec_of
from woq.algorithms import build
from woq.algorithms.awq import output_error, search_scale
from woq.algorithms.base import LayerResult
from woq.algorithms.hessian import relative_error
from woq.algorithms.rtn import round_to_nearest
from woq.algorithms.scaling import Consumer, round_by_output
from woq.configs import AwqConfig
from woq.folds import Fold
from woq.quant import _asymmetric, _symmetric, dequantize, group_factors, quantize
from woq.replay import BlockCall, BlockInputs

K, GROUP = 64, 16


class Block(nn.Module):
    """norm -> (gate, up) -> product -> down: three linears behind two folds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(K)
        self.gate, self.up = nn.Linear(K, 96, bias=False), nn.Linear(K, 96)
        self.down = nn.Linear(96, K)

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.norm(hidden)
        return hidden + self.down(nn.functional.gelu(self.gate(x)) * self.up(x))


def block_and_inputs() -> tuple[Block, BlockInputs]:
    torch.manual_seed(0)
    block = Block().requires_grad_(False)
    block.norm.weight[::9] *= 12  # as in language models: a few features are much larger
    batches = [part.unsqueeze(0) for part in correlated(400, K).chunk(4)]
    return block, BlockInputs(torch.device("cpu"), batches, [BlockCall((), {})] * 4, [None] * 4)


def run(
    block: Block, inputs: BlockInputs, names: str = "gate up down", **config: Any
) -> dict[str, LayerResult]:
    settings = AwqConfig(**{"bits": 3, "group_size": GROUP, **config})
    specs = {
        n: spec_of(block.get_submodule(n), settings.bits, GROUP, sym=settings.sym)  # type: ignore[arg-type]
        for n in names.split()
    }
    return build(settings).quantize_block(block, specs, inputs)


def moved(block: nn.Module, reference: nn.Module, inputs: BlockInputs) -> float:
    """Squared change of the block's output."""
    with torch.no_grad():
        return sum(float((block(h) - reference(h)).square().sum()) for h in inputs.hidden)


# --- the parts against plain loops ------------------------------------------------------------------------------------


def moment_of(x: Tensor) -> Tensor:
    return x.t() @ x / len(x)


def test_search_finds_the_best_exponent() -> None:
    """By brute force over the outputs themselves, two linears and grouped channels."""
    torch.manual_seed(1)
    x = correlated(300, K)
    weights = [torch.randn(24, K), torch.randn(40, K) * 3]
    specs = [spec_of(nn.Linear(K, len(w)), 3, GROUP, sym=False) for w in weights]
    source = torch.arange(K) % 32  # two features a channel
    fold = Fold("norm", "norm", ("a", "b"), (), 0, 32, source)
    got = search_scale(
        fold, [Consumer(w, moment_of(x), spec) for w, spec in zip(weights, specs, strict=True)], clips=False
    )
    power = x.square().mean(0).view(2, 32).mean(0).sqrt()

    def cost(s: Tensor) -> float:
        total = 0.0
        for w, spec in zip(weights, specs, strict=True):
            rounded = round_to_nearest(w * s[source], spec, "minmax").dequantize() / s[source]
            total += float((x @ (w - rounded).t()).square().sum() / (x @ w.t()).square().sum())
        return total

    tried = []
    for i in range(20):
        s = power ** (i / 20)
        tried.append(s / (s.max() * s.min()).sqrt())
    costs = [cost(s) for s in tried]
    best = min(range(20), key=lambda i: costs[i])
    assert best > 0 and costs[best] < 0.9 * costs[0]  # scaling pays here
    assert torch.allclose(got, tried[best], rtol=1e-4)


def test_a_scale_that_clipping_makes_worse_is_not_kept() -> None:
    torch.manual_seed(1)
    x, consumers = correlated(300, K), []
    for rows in (24, 40):
        spec = spec_of(nn.Linear(K, rows), 2, GROUP, sym=False)
        consumers.append(Consumer(torch.randn(rows, K), moment_of(x), spec))
    fold = Fold("norm", "norm", ("a", "b"), (), 0, K, torch.arange(K))
    one = torch.ones(K)
    for clips in (False, True):
        s = search_scale(fold, consumers, clips)
        assert output_error(fold, consumers, s, clips) <= output_error(fold, consumers, one, clips)


@pytest.mark.parametrize(("bits", "sym"), [(4, True), (2, False)])
def test_clipping_minimises_the_groups_output_error(bits: int, sym: bool) -> None:
    """Each group of each row by itself: of the ranges that are tried, the one whose output is nearest on the data."""
    torch.manual_seed(2)
    x, weight = correlated(300, K), torch.randn(6, K)
    spec = spec_of(nn.Linear(K, 6), bits, GROUP, sym=sym)
    got = round_by_output(weight, spec, moment_of(x)).dequantize()
    ridge = 0.01 * float(moment_of(x).diagonal().mean())
    choose, shares = (_symmetric if sym else _asymmetric), torch.tensor(group_factors(bits, sym, "mse"))

    def error(difference: Tensor, inputs: Tensor) -> float:
        return float((inputs @ difference).square().mean() + ridge * difference.square().sum())

    for start in range(0, K, GROUP):
        inputs = x[:, start : start + GROUP]
        for row in range(6):
            w = weight[row, start : start + GROUP]
            scales, zeros = choose(w.unsqueeze(0), bits, torch.float16, shares)
            tried = [
                error(w - dequantize(quantize(w, s[0], z[0], bits), s[0], z[0]), inputs)
                for s, z in zip(scales, zeros, strict=True)
            ]
            assert error(w - got[row, start : start + GROUP], inputs) == pytest.approx(min(tried), rel=1e-3)


def test_a_short_last_group_and_one_group(rng: torch.Generator) -> None:
    x, weight = torch.randn(200, 40, generator=rng), torch.randn(6, 40, generator=rng)
    for size in (16, 40):
        spec = spec_of(nn.Linear(40, 6), 4, size, sym=False)
        quantized = round_by_output(weight, spec, moment_of(x))
        assert quantized.scales.shape == (6, spec.groups)
        assert relative_error(weight, quantized.dequantize(), moment_of(x)) < 0.02


# --- in a block -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sym", [True, False])
def test_each_part_lowers_the_linears_errors(sym: bool) -> None:
    errors = {}
    for scale in (False, True):
        for clip in (False, True):
            block, inputs = block_and_inputs()
            results = run(block, inputs, sym=sym, auto_scale=scale, auto_clip=clip)
            errors[scale, clip] = sum(result.loss for result in results.values())
    assert errors[True, False] < errors[False, False]
    assert errors[False, True] < 0.9 * errors[False, False]
    assert errors[True, True] < errors[True, False]
    assert errors[True, True] <= errors[False, True]  # and no scale where clipping alone is better


def test_the_scale_stands_in_the_norm_and_in_the_codes() -> None:
    block, inputs = block_and_inputs()
    results = run(block, inputs, bits=8, auto_clip=False)
    reference = block_and_inputs()[0]
    s = reference.norm.weight / block.norm.weight
    assert float(s.max() / s.min()) > 1.5
    for name in ("gate", "up"):
        due = reference.get_submodule(name).weight * s  # type: ignore[operator]
        due = due / (1.0 if name == "gate" else (reference.up.bias / block.up.bias).unsqueeze(1))
        assert torch.allclose(results[name].weight.dequantize(), due, atol=0.02 * float(due.abs().max()))
    assert all(result.note == "" and result.tokens == 400 for result in results.values())
    assert moved(block, reference, inputs) < 1e-3 * moved(nn.Identity(), reference, inputs)


def test_without_folding_nothing_is_scaled_and_it_says_so() -> None:
    block, inputs = block_and_inputs()
    results = run(block, inputs, folding=False)
    unscaled, _ = block_and_inputs()
    plain = run(unscaled, inputs, auto_scale=False)
    assert torch.equal(block.norm.weight, block_and_inputs()[0].norm.weight)
    for name, result in results.items():
        assert result.note == "input not scaled: folding=False"
        assert plain[name].note == ""
        assert torch.equal(result.weight.codes, plain[name].weight.codes)


def test_linears_left_in_float_are_scaled_along() -> None:
    """`up` is not quantized, but takes what `gate` takes."""
    block, inputs = block_and_inputs()
    assert run(block, inputs, "gate", bits=8, auto_clip=False).keys() == {"gate"}
    reference = block_and_inputs()[0]
    assert not torch.equal(block.up.weight, reference.up.weight)
    assert moved(block, reference, inputs) < 1e-3 * moved(nn.Identity(), reference, inputs)


def test_statistics_in_several_runs_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for budget in (4 << 30, 1):
        monkeypatch.setattr("woq.algorithms.stages.MOMENT_BYTES", budget)
        block, inputs = block_and_inputs()
        results.append(run(block, inputs, bits=4))
    for name in results[0]:
        one, other = (r[name].weight.dequantize() for r in results)
        assert (
            float((one != other).float().mean()) < 0.01
        )  # moments rescaled, or gathered from rescaled inputs


def test_stages_see_what_earlier_ones_became() -> None:
    losses = {}
    for name, config in {
        "at once": {},
        "true_sequential": {"true_sequential": True},
        "listed": {"modules_in_block_to_quantize": (("gate", "up"), ("down",))},
    }.items():
        block, inputs = block_and_inputs()
        losses[name] = {n: r.loss for n, r in run(block, inputs, bits=2, **config).items()}
    assert losses["true_sequential"] == losses["listed"]
    assert losses["at once"]["gate"] == losses["listed"]["gate"]
    assert losses["at once"]["down"] != losses["listed"]["down"]
