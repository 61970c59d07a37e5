"""Gradients recorded as a CUDA graph, and the nested arguments that they are recorded for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.algorithms.test_autoround import run
from tests.algorithms.test_gptq import block_and_inputs
from woq.nested import mapped, tensors_in
from woq.recording import recorded


@dataclass(frozen=True)
class Pair:
    first: Any
    second: Any


def test_every_tensor_is_found_and_changed_in_one_order() -> None:
    a, b, c, d = (torch.full((2,), float(i)) for i in range(4))
    value = (Pair(a, {"b": b, "name": "x"}), [c, None, 3], d)
    assert [t[0].item() for t in tensors_in(value)] == [0, 1, 2, 3]
    pair, listed, last = mapped(value, lambda t: int(t[0]) + 10)
    assert (pair, listed, last) == (Pair(10, {"b": 11, "name": "x"}), [12, None, 3], 13)
    assert value[0].first is a, "nothing is changed in place"
    assert mapped(Pair, lambda t: t) is Pair, "a class is not a container"


def gradients(example: list[Tensor]) -> list[Tensor]:
    x, weight = example
    weight = weight.detach().requires_grad_()
    return list(torch.autograd.grad((x @ weight).square().sum(), [weight]))


@pytest.mark.parametrize(("device", "weights"), [("cpu", 10), ("cuda", 10**9)])
def test_only_small_steps_on_a_gpu_are_recorded(device: str, weights: int) -> None:
    assert recorded(gradients, torch.device(device), weights, tokens=2048) is gradients


def examples(count: int, rows: int = 4) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(rows)
    return [
        [torch.randn(rows, 8, generator=generator).cuda(), torch.randn(8, 3, generator=generator).cuda()]
        for _ in range(count)
    ]


@pytest.mark.gpu
class TestOnGpu:
    """What needs a device."""

    def test_replayed_is_as_computed(self) -> None:
        calls = []

        def counted(example: list[Tensor]) -> list[Tensor]:
            calls.append(1)
            return gradients(example)

        step = recorded(counted, torch.device("cuda"), weights=24, tokens=4)
        for example in examples(6):
            torch.testing.assert_close(step(example), gradients(example))
        assert len(calls) == 3, "two to warm up, one recorded"
        for example in examples(2, rows=5):  # of another form
            torch.testing.assert_close(step(example), gradients(example))
        assert len(calls) == 5

    def test_a_step_that_waits_is_computed_as_ever(self) -> None:
        def waiting(example: list[Tensor]) -> list[Tensor]:
            assert example[0].sum().item() != 0
            return gradients(example)

        step = recorded(waiting, torch.device("cuda"), weights=24, tokens=4)
        first, second, third, fourth = examples(4)
        for example in (first, second):
            torch.testing.assert_close(step(example), gradients(example))
        with pytest.warns(UserWarning, match="without a CUDA graph"):
            torch.testing.assert_close(step(third), gradients(third))
        torch.testing.assert_close(step(fourth), gradients(fourth))

    def test_autoround_trains_to_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        weights = []
        for bound in (0.0, 1e12):
            monkeypatch.setattr("woq.recording._LAUNCH_BOUND", bound)
            block, inputs = block_and_inputs()
            inputs.device = torch.device("cuda")
            block.cuda()
            inputs.hidden = [h.cuda() for h in inputs.hidden]
            weights.append(run(block, inputs, init="rtn", iters=20, gradient_accumulate_steps=2)["q"].weight)
        assert torch.equal(weights[0].codes, weights[1].codes)
        torch.testing.assert_close(weights[0].scales, weights[1].scales)
