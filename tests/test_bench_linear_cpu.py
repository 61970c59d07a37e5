"""benchmarks/bench_linear_cpu.py on small layers: what it measures is checked, what is absent is said, tables read as written."""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_linear_cpu as bench
from benchmarks import cpu_tables
from benchmarks.common import Absent, quantiles, random_weight
from benchmarks.cpu_peers import Peer, dense, int4pack, peers

SHAPE = "256x64"


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    """Two rounds of a small layer."""
    return argparse.Namespace(
        out=tmp_path / "linear.csv", threads=[torch.get_num_threads()], shapes=[SHAPE], widths=["4"], tokens=[1, 3],
        backends=["dense fp32", "torch int4pack", "broken", "absent"], group_size=128, rounds=2, slice=1e-4,
        footprint=5e4, ggml=None, commit="abc",
    )  # fmt: skip


def broken(weight: Any) -> Any:
    return (lambda x: lambda: x @ weight.dequantize().T * 1.05), None


def absent(weight: Any) -> Any:
    raise Absent("it is not installed")


def test_rows_of_what_is_right_and_reasons_for_the_rest(
    options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [Peer("broken", "woq", "int8", broken), Peer("absent", "woq", "exact", absent)]
    monkeypatch.setattr(bench, "peers", lambda *a: [*peers(*a), *more])
    bench.worker(options)
    said = capsys.readouterr().out
    assert "left out: broken: relative error 0.05" in said
    assert "left out: absent: it is not installed" in said
    with options.out.open() as file:
        rows = list(csv.DictReader(file))
    times = {(row["backend"], row["M"]): float(row["p50"]) for row in rows if row["metric"] == "time"}
    assert set(times) == {(name, m) for name in ("dense fp32", "torch int4pack") for m in ("1", "3")}
    assert all(0 < us < 1e6 for us in times.values())
    errors = {row["backend"]: float(row["p50"]) for row in rows if row["metric"] == "error"}
    assert errors["dense fp32"] < 1e-6 < errors["torch int4pack"] < 0.01
    table = cpu_tables.tables(rows)
    assert "| 256 -> 64, " in table
    assert (
        f"| dense fp32 | exact | {times['dense fp32', '1']:.0f} | {times['dense fp32', '3']:.0f} |" in table
    )


def test_turns_rotate_over_layers() -> None:
    seen: list[int] = []
    layers = [lambda x, i=i: lambda: seen.append(i) or x for i in range(3)]
    turns = bench.Turns(layers, torch.zeros(1, 1))  # type: ignore[arg-type]
    turns.turn(0.0)
    turns.turn(0.0)
    assert seen[:7] == [0, 1, 2, 0, 1, 2, 0]
    assert len(turns.samples) == 2


@pytest.mark.parametrize("sym", [True, False])
def test_peers_multiply_what_they_are_given(sym: bool) -> None:
    weight = random_weight(bench.spec_of("4" if sym else "4-asym", SHAPE, 128), 0, "cpu")
    for make in (dense(torch.bfloat16), int4pack):
        layer, error = bench.checked(Peer("any", "torch", "exact", make), weight)
        assert error < bench.ALLOWED["exact"]
        assert layer(torch.zeros(2, 256))().shape == (2, 64)


def test_the_command(tmp_path: Path) -> None:
    """With ONNX Runtime, whose pool is made once a process; a weight that a peer does not compute is no row of its."""
    pytest.importorskip("onnxruntime")
    out = tmp_path / "linear.csv"
    options = ["--threads", "1", "--shapes", SHAPE, "--tokens", "2", "--rounds", "1", "--footprint", "1e4"]
    options += [
        "--widths",
        "4",
        "2",
        "--backends",
        "onnxruntime",
        "onnxruntime int8",
        "woq bf16",
        "--out",
        str(out),
    ]
    command = [sys.executable, "-m", "benchmarks.bench_linear_cpu", *options]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    rows = [row for row in cpu_tables.read(out) if row["metric"] == "error"]
    errors = {(row["backend"], row["bits"]): float(row["p50"]) for row in rows}
    assert errors["onnxruntime", "4"] < 1e-5 < errors["onnxruntime int8", "4"] < 0.02
    assert ("onnxruntime", "2") not in errors
    assert ("woq bf16", "4") in errors


def test_quantiles() -> None:
    assert quantiles([5.0, 1.0, 3.0, 2.0, 4.0, 0.0]) == (1.0, 2.0, 4.0)
