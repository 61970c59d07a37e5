"""benchmarks/bench_model.py on the CPU, so that it still runs when a GPU's time is at hand."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from transformers import StaticCache

from benchmarks import bench_model as bench
from woq.linear import QuantLinear


def test_packs_in_place_and_measures_both_phases() -> None:
    model = bench.llama(1, 256, 64, "cpu")
    before = model(torch.arange(8)[None]).logits
    bench.pack(model.model, 8, 128, "reference")
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 7
    after = model(torch.arange(8)[None]).logits
    assert 0 < (after - before).norm() / before.norm() < 0.05
    assert len(bench.decode_rates(model, 4, 2, 2, lambda step: step)) == 2
    assert len(bench.prefill_times(model, 8, 2)) == 2


@pytest.mark.parametrize("attention", ["grouped", "products"])
def test_attention_of_one_token_is_attention(attention: str) -> None:
    models = [bench.llama(2, 512, 64, "cpu", each).float() for each in ("sdpa", attention)]
    assert models[0].config.num_attention_heads > models[0].config.num_key_value_heads
    logits = []
    for model in models:
        cache = StaticCache(config=model.config, max_cache_len=8)
        with torch.no_grad():
            prompt = model(torch.arange(4)[None], past_key_values=cache).logits
            logits.append([prompt, model(torch.tensor([[5]]), past_key_values=cache).logits])
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize("vocabulary", [64, 1000, 1001, 128256])
def test_the_best_token_is_the_best(vocabulary: int) -> None:
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    assert torch.equal(bench.greedy(logits), logits.argmax(-1, keepdim=True))


def arguments(monkeypatch: pytest.MonkeyPatch, **options: object) -> Namespace:
    """Those of the script for a tiny model on the CPU, head packed too."""
    given = {
        "layers": 2,
        "hidden": 256,
        "vocabulary": 64,
        "prompt": 4,
        "steps": 2,
        "prefill": 8,
        "repeats": 2,
    }
    given |= {"device": "cpu", "compile": "nothing", "head": "packed", "commit": "none", **options}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["bench_model", *words])
    return bench.arguments()


def test_a_decoding_step_is_one_graph_at_every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(monkeypatch, backend="cpu")
    model = bench.llama(args.layers, args.hidden, args.vocabulary, args.device)
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    whole = partial(torch.compile, backend=keep, fullgraph=True, dynamic=False)
    for _ in bench.stages(model, args):
        bench.decode_rates(model, args.prompt, args.steps, args.repeats, whole)
    products = [sum("cpu_linear" in str(node.target) for node in graph.graph.nodes) for graph in graphs]
    assert products == [0, 8, 9]


def test_rows_say_what_was_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(bench.measure(arguments(monkeypatch, backend="reference")))
    said = [(row["backend"], row["bits"], row["head"], row["phase"]) for row in rows]
    assert said == [
        (*stage, phase)
        for stage in (("bf16", 16, "float"), ("reference", 4, "float"), ("reference", 4, "packed"))
        for phase in ("decode", "prefill")
    ]
    assert all(set(row) == set(bench.FIELDS) for row in rows)
