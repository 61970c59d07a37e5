"""benchmarks/bench_model_cpu.py on a tiny Llama: every variant has its rows, and the times are of what they say."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import bench_model_cpu as bench


def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "float")
    options = argparse.Namespace(
        model=str(tmp_path / "float"), group_size=64, threads=1, prompt=8, new=2, rounds=2, llama_bench=None,
        variants=["transformers fp32", "woq fp32", "woq fp32 int8, head, fused"], commit="abc",
    )  # fmt: skip
    rows = list(bench.measured(options, tmp_path))
    found = {(row["variant"], row["metric"]): float(row["p50"]) for row in rows}
    for variant in options.variants:
        assert found[variant, "prefill"] > 0
        assert found[variant, "decode"] > 0
        assert 0 < found[variant, "prefill: share in linears"] < 1
    assert found["woq", "overhead of a call"] < 1e4
    assert "left out: llama.cpp: pass --llama-bench" in capsys.readouterr().out


class Slow(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return super().forward(x)


def test_share_is_that_of_the_linears() -> None:
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.Sequential(Slow(4, 4), nn.ReLU())

    def work() -> None:
        model.model.layers(torch.zeros(1, 4))
        time.sleep(0.02)

    assert 0.3 < bench.share_in_linears(model, work) < 0.7
