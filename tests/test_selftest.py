"""The self-test passes what is right and tells what is wrong: it is only worth posting if it can fail."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from woq import cli, native, selftest
from woq.backends import load
from woq.backends.base import Target
from woq.backends.reference import ReferenceBackend
from woq.device import available_devices
from woq.selftest import GROUPS, TOKENS, grid, report, run_selftest, sample, summarize, targets
from woq.weights import DATA_TYPES, PackedWeight, QuantizedWeight, WeightSpec

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def few() -> list[WeightSpec]:
    """One group size, every width."""
    return [spec for spec in grid() if spec.group_size == 128 and spec.scale_dtype == torch.float16]


@pytest.fixture
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = few()
    monkeypatch.setattr(selftest, "grid", lambda: specs)


def test_the_grid_is_all_of_it() -> None:
    specs = grid()
    assert len(specs) == len(set(specs))
    whole = [spec for spec in specs if spec.data_type == "int" and spec.double_quant is None]
    assert len(whole) == 7 * 2 * 2 * (2 * len(GROUPS) - 1)
    for data_type in DATA_TYPES:
        of_it = [spec for spec in specs if spec.data_type == data_type]
        assert {spec.group_size for spec in of_it} == set(GROUPS)
        assert any(spec.double_quant for spec in of_it) or data_type == "int_float_zeros"
    assert {spec.bits for spec in specs} == set(range(2, 9))
    assert {(t.device.type, t.dtype) for t in targets()} == {
        (device, dtype) for device in available_devices() for dtype in DTYPES
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_right_passes(dtype: torch.dtype) -> None:
    rows = run_selftest([Target(CPU, dtype)])
    assert rows and all(row.passed for row in rows)
    assert {row.tokens for row in rows} == set(TOKENS)
    ran = {row.backend for row in rows}
    assert ran >= {"reference"} | ({"torch"} if dtype == torch.bfloat16 else set())
    assert ("cpu" in ran) == (native.why_not("cpu") is None)
    assert sum(line.cases for line in summarize(rows)) == len(rows)


def zero_off_by_one(w: QuantizedWeight) -> QuantizedWeight:
    return replace(w, zeros=w.zeros - 1)


def zeros_of_the_neighbour(w: QuantizedWeight) -> QuantizedWeight:
    return replace(w, zeros=w.zeros.roll(1, dims=0))


def scales_of_the_neighbour(w: QuantizedWeight) -> QuantizedWeight:
    return replace(w, scales=w.scales.roll(1, dims=0))


def codes_swapped_in_pairs(w: QuantizedWeight) -> QuantizedWeight:
    return replace(w, codes=w.codes.view(len(w.codes), -1, 2).flip(-1).flatten(1))


def order_ignored(w: QuantizedWeight) -> QuantizedWeight:
    return replace(w, g_idx=None)


MISTAKES = {
    zero_off_by_one: lambda spec: True,
    zeros_of_the_neighbour: lambda spec: not spec.sym,
    scales_of_the_neighbour: lambda spec: True,
    codes_swapped_in_pairs: lambda spec: True,
    order_ignored: lambda spec: spec.desc_act,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda f: f.__name__)
def test_what_is_wrong_fails_for_every_width(
    mistake: object, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    shows = MISTAKES[mistake]  # type: ignore[index]
    specs = [spec for spec in few() if shows(spec)]
    monkeypatch.setattr(selftest, "grid", lambda: specs)

    def apply(self: ReferenceBackend, x: Tensor, state: PackedWeight) -> Tensor:
        return torch.nn.functional.linear(x, mistake(state.unpack()).dequantize(x.dtype))  # type: ignore[operator]

    monkeypatch.setattr(ReferenceBackend, "apply", apply)
    rows = [row for row in run_selftest([Target(CPU, dtype)]) if row.backend == "reference"]
    assert len(rows) == len(specs) * len(TOKENS)
    assert not [row for row in rows if row.passed]


@pytest.mark.usefixtures("_few")
def test_what_raises_or_is_no_number_fails_and_the_rest_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def apply(self: ReferenceBackend, x: Tensor, state: PackedWeight) -> Tensor:
        if state.spec.bits == 3:
            raise RuntimeError("could not create a primitive")
        return torch.full((len(x), state.spec.out_features), math.nan, dtype=x.dtype)

    monkeypatch.setattr(ReferenceBackend, "apply", apply)
    rows = [row for row in run_selftest([Target(CPU, torch.float32)]) if row.backend == "reference"]
    assert rows and not any(row.passed for row in rows)
    assert {row.raised for row in rows if row.bits == 3} == {"could not create a primitive"}
    lines = {line.bits: line for line in summarize(rows) if line.data_type == "int"}
    assert math.isinf(lines[3].worst_error) and math.isnan(lines[4].worst_error)
    assert all(line.failed == line.cases for line in lines.values())
    assert report(rows)["passed"] is False


def test_nothing_run_is_no_pass() -> None:
    assert report([])["passed"] is False


def test_samples_are_what_their_spec_says() -> None:
    for spec in grid():
        weight = sample(spec)
        unpacked = weight.pack().unpack()
        assert torch.equal(unpacked.codes, weight.codes) and torch.equal(unpacked.zeros, weight.zeros)
        assert torch.equal(unpacked.scales, weight.scales)
        assert (weight.zeros == (0 if spec.is_codebook else 1 << (spec.bits - 1))).all() == spec.sym
        assert (weight.g_idx is not None) == spec.desc_act


@pytest.mark.usefixtures("_few")
def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    told = CliRunner().invoke(cli.app, ["doctor", "--selftest"])
    assert told.exit_code == 0, told.output
    assert "every product is right" in told.output and "reference" in told.output
    posted = CliRunner().invoke(cli.app, ["doctor", "--selftest", "--json"])
    found = json.loads(posted.output)
    assert found["passed"] and not found["failures"] and found["versions"]["torch"] == torch.__version__
    assert {line["backend"] for line in found["summary"]} >= {"torch", "reference"}
    monkeypatch.setattr(type(load("torch")), "apply", lambda self, x, state: x.new_zeros(len(x), 80))
    told = CliRunner().invoke(cli.app, ["doctor", "--selftest"])
    assert told.exit_code == 1
    assert "products are wrong" in told.output
