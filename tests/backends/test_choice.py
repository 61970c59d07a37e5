"""The table of backends: best first, every refusal told, nothing imported that is not needed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from woq.backends import BACKENDS, Entry, choose, load, refusals, why_not
from woq.backends.base import Backend, Target
from woq.errors import BackendError
from woq.weights import DATA_TYPES, DataType, WeightSpec

SPEC = WeightSpec(64, 16, 4, 32, True)
BF16 = Target(torch.device("cpu"), torch.bfloat16)
FP32 = Target(torch.device("cpu"), torch.float32)
NAMES = [entry.name for entry in BACKENDS]
FP64 = Target(torch.device("cpu"), torch.float64)  # which no kernel computes in


@pytest.fixture(autouse=True)
def _built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choosing runs nothing: as on a machine where the compiled kernels are there."""
    monkeypatch.setattr("woq.native.why_not", lambda name: None)


@pytest.mark.parametrize("entry", BACKENDS, ids=NAMES)
def test_entries_are_what_they_say(entry: object) -> None:
    name = entry.name  # type: ignore[attr-defined]
    devices = entry.devices  # type: ignore[attr-defined]
    if devices is not None and "cpu" not in devices:
        pytest.skip(f"{name} is not imported on a machine without {devices}")
    assert isinstance(load(name), Backend)
    assert load(name).name == name
    assert load(name) is load(name)


def test_names_are_distinct_and_the_reference_comes_last() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert BACKENDS[-1].name == "reference"
    assert BACKENDS[-1].devices is None


def test_the_best_that_can() -> None:
    assert choose(SPEC, BF16).name == choose(SPEC, FP32).name == "cpu"
    assert choose(SPEC, FP64).name == "reference"
    assert choose(SPEC, BF16, "reference").name == "reference"


def test_without_compiled_kernels_the_next_best_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("woq.native.why_not", lambda name: f"no compiler for the {name} kernels")
    assert choose(SPEC, BF16).name == "torch"
    assert refusals(SPEC, BF16) == {"cpu": "no compiler for the cpu kernels"}
    assert choose(SPEC, FP32).name == "reference"
    assert list(refusals(SPEC, FP32)) == ["cpu", "torch"]


def test_some_are_taken_only_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Entry("first", ("cpu",), "woq.backends.reference:ReferenceBackend", by_name_only=True)
    monkeypatch.setattr("woq.backends.BACKENDS", (first, *BACKENDS))
    assert choose(SPEC, BF16) is load("cpu")
    assert choose(SPEC, BF16, "first") is load("first")
    load.cache_clear()


def test_a_backend_that_cannot_is_refused_with_its_reason() -> None:
    with pytest.raises(
        BackendError, match=r"16x64, 4 bits \(int\), group 32, torch\.float32 on cpu: torch: .*bfloat16 only"
    ) as error:
        choose(SPEC, FP32, "torch")
    assert error.value.hint is not None
    assert "reference" in error.value.hint


def test_every_reason_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("woq.backends.BACKENDS", tuple(e for e in BACKENDS if e.name != "reference"))
    with pytest.raises(BackendError) as error:
        choose(WeightSpec(64, 16, 5, 32, True), FP64)
    for entry in BACKENDS[:-1]:
        assert (f"{entry.name}: " in error.value.message) == (not entry.by_name_only)


@pytest.mark.parametrize("name", ["marlin", "", "CPU"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(BackendError, match=rf"unknown backend '{name}'\n.*cpu.*reference.*auto"):
        choose(SPEC, BF16, name)


def test_another_devices_backend_is_refused_without_importing_it() -> None:
    meta = Target(torch.device("meta"), torch.bfloat16)
    for entry in BACKENDS[:-1]:
        reason = why_not(entry.name, SPEC, meta)
        assert reason is not None
        assert "not on meta" in reason


def test_refusals_are_those_of_this_device() -> None:
    assert refusals(SPEC, BF16) == {}
    assert refusals(SPEC, FP32) == {}
    assert list(refusals(SPEC, FP64)) == ["cpu", "torch"]


@pytest.mark.parametrize("data_type", DATA_TYPES)
def test_a_data_type_runs_only_where_it_is_computed(data_type: DataType) -> None:
    """Codes of a codebook look like any others: a backend that takes them for numbers would answer garbage."""
    spec = replace(SPEC, sym=data_type != "int_float_zeros", data_type=data_type)
    for entry in BACKENDS:
        device = torch.device("cpu" if entry.devices is None else entry.devices[0])
        reason = why_not(entry.name, spec, Target(device, torch.bfloat16))
        if data_type not in load(entry.name).data_types:
            assert reason is not None and f"weights, not {data_type}" in reason
    assert choose(spec, FP64).name == "reference"
    assert choose(spec, BF16).name == "cpu"
