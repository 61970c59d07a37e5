"""benchmarks/bench_model.py on the CPU, so that it still runs when a GPU's time is at hand."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from pathlib import Path

import torch

from woq.linear import QuantLinear

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/bench_model.py"


def test_packs_in_place_and_measures_both_phases() -> None:
    spec = importlib.util.spec_from_file_location("bench_model", SCRIPT)
    assert spec is not None and spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    model = bench.llama(1, 256, 64, "cpu")
    before = model(torch.arange(8)[None]).logits
    bench.pack_layers(model, 8, 128, "reference")
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 7
    after = model(torch.arange(8)[None]).logits
    assert 0 < (after - before).norm() / before.norm() < 0.05
    assert len(bench.decode_rates(model, 4, 2, 2, nullcontext())) == 2
    assert len(bench.prefill_times(model, 8, 2)) == 2
