"""Forward passes that wait in front of linears see what passes run anew would, and end when nobody goes on with them."""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.algorithms.test_gptq import Attention, block_and_inputs, run, spec_of
from woq.algorithms.gathering import gathering
from woq.errors import CalibrationError
from woq.replay import BlockInputs, advance, input_groups
from woq.walk import Walk, can_walk, walkers

CPU = torch.device("cpu")


THREADS = walkers()


def waiting() -> int:
    """Passes that wait: threads without work stand elsewhere."""
    frames = sys._current_frames()
    mine = [t.ident for t in threading.enumerate() if t.name.startswith("forward pass")]
    return sum("wait_with" in _functions(frames[ident]) for ident in mine if ident in frames)


def _functions(frame: FrameType | None) -> list[str]:
    names = []
    while frame is not None:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return names


def drifted() -> tuple[Attention, BlockInputs]:
    block, inputs = block_and_inputs()
    inputs.float_hidden = inputs.hidden
    inputs.hidden = [h + 0.05 * h.roll(1, -1) for h in inputs.hidden]
    return block, inputs


def gathered(sequential: bool) -> tuple[list[Tensor], BlockInputs, Attention]:
    """Both moments of the two groups, q halved between them."""
    block, inputs = drifted()
    specs = {name: spec_of(block.get_submodule(name)) for name in "qkvo"}  # type: ignore[arg-type]
    groups = input_groups(block, "qkvo", inputs)
    assert groups == [("q", "k", "v"), ("o",)]
    seen = []
    in_turn = [[group] for group in groups] if sequential else [groups, [("o",)]]
    with gathering(block, specs, in_turn, groups, inputs, THREADS) as gather:
        for stage in in_turn:
            moments = gather.moments(stage)
            wanted = moments[stage[0][0]]
            assert wanted.drift is not None
            seen += [wanted.normalized(), wanted.drift]
            if stage is in_turn[0]:
                with torch.no_grad():
                    block.q.weight.mul_(0.5)
        gather.finish()
    assert (inputs.outputs is not None) == sequential  # only a walk comes to them
    return seen, inputs, block


def test_a_walk_sees_what_running_anew_does() -> None:
    walked, inputs, block = gathered(sequential=True)
    anew, others, _ = gathered(sequential=False)
    for a, b in zip(walked, anew, strict=True):
        torch.testing.assert_close(a, b)
    assert (
        inputs.outputs is not None and inputs.float_outputs is not None and others.float_outputs is not None
    )
    with torch.no_grad():
        for a, b in zip(inputs.outputs, advance(block, inputs, CPU), strict=True):
            assert torch.equal(a, b)
    for a, b in zip(inputs.float_outputs, others.float_outputs, strict=True):
        assert torch.equal(a, b)
    assert waiting() == 0


def test_codes_do_not_depend_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    walked = run(*drifted())
    monkeypatch.setattr("woq.algorithms.gathering.can_walk", lambda *_: False)
    for name, result in run(*drifted()).items():
        assert torch.equal(result.weight.codes, walked[name].weight.codes)


def test_an_error_inside_a_pass_is_the_callers() -> None:
    block, inputs = block_and_inputs()

    def fail(*_: Any) -> None:
        raise RuntimeError("no such luck")

    block.o.register_forward_pre_hook(fail)
    with Walk(block, inputs, ["q", "o"], THREADS) as walk:
        assert len(list(walk.to("q"))) == len(inputs.hidden)
        assert waiting() == len(inputs.hidden)
        with pytest.raises(RuntimeError, match="no such luck"):
            walk.finish()
    assert waiting() == 0


def test_what_nobody_goes_on_with_is_left() -> None:
    block, inputs = block_and_inputs()
    with pytest.raises(KeyError), Walk(block, inputs, ["q"], THREADS) as walk:
        next(walk.to("q"))
        raise KeyError
    assert waiting() == 0
    assert not block.q._forward_pre_hooks


def test_outputs_that_are_not_finite_are_named() -> None:
    block, inputs = block_and_inputs()
    inputs.hidden[1][0, 3] = float("inf")
    with (
        pytest.raises(CalibrationError, match="calibration batch 1, samples"),
        Walk(block, inputs, [], THREADS) as walk,
    ):
        walk.finish()


def test_when_a_block_can_be_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    block, inputs = block_and_inputs()
    groups = [("q", "k", "v"), ("o",)]
    assert can_walk(block, [[groups[0]], [groups[1]]], groups, 64, inputs, 2)
    assert not can_walk(block, [groups], groups, 64, inputs, 2)  # one stage of two inputs
    assert not can_walk(block, [[groups[1]], [groups[0]]], groups, 64, inputs, 2)  # not in the order they run
    monkeypatch.setattr("woq.walk.free_memory", lambda _: 1000)
    assert not can_walk(block, [[groups[0]], [groups[1]]], groups, 64, inputs, 2)
