"""Calibration with more than the data: samples that the model writes, going on with tokens of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from woq import CalibrationError, GPTQConfig, quantize
from woq.calibration import calibration_batches, sample_from_model
from woq.calibration.batches import Sample, openings_of

IDS = torch.arange(3, 99).view(4, 24)


def test_the_model_goes_on_with_openings(tiny_model: Callable[[str], nn.Module]) -> None:
    openings = IDS[:3, :5]
    rows = sample_from_model(tiny_model("llama"), num_samples=3, seq_len=12, seed=0, openings=openings)
    assert rows.shape == (3, 12)
    assert torch.equal(rows[:, :5], openings)
    others = sample_from_model(tiny_model("llama"), num_samples=3, seq_len=12, seed=0, openings=openings + 1)
    assert not torch.equal(rows[:, 5:], others[:, 5:])


def test_openings_are_tokens_that_count() -> None:
    mask = torch.tensor([True] * 20 + [False] * 4)
    samples = [Sample(row, mask) for row in IDS]
    openings = openings_of(samples, 50, seq_len=24, seed=0)
    assert openings.shape == (50, 12)  # half of a sample
    assert torch.isin(openings, IDS[:, :20]).all()
    assert (openings.diff(dim=1) == 1).all(), "neighbours in one sample"
    assert len(openings.unique(dim=0)) > 10
    assert torch.equal(openings, openings_of(samples, 50, seq_len=24, seed=0))
    assert openings_of([Sample(IDS[0, :3])], 2, seq_len=24, seed=0).tolist() == [IDS[0, :3].tolist()] * 2


def test_own_samples_come_beside_the_data(tiny_model: Callable[[str], nn.Module]) -> None:
    model = tiny_model("llama")
    options = {"model": model, "num_samples": 4, "seq_len": 24, "batch_size": 2}
    plain = calibration_batches(IDS, **options)
    more = calibration_batches(IDS, own_samples=3, **options)
    assert [len(batch.input_ids) for batch in more] == [2, 2, 2, 1]
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(plain, more, strict=False))
    again = calibration_batches(IDS, own_samples=3, **options)
    assert torch.equal(more[2].input_ids, again[2].input_ids)
    with pytest.raises(CalibrationError, match="none was given"):
        calibration_batches(IDS, own_samples=3)


def test_quantizing_uses_and_reports_them(tiny_model: Callable[[str], nn.Module]) -> None:
    config = GPTQConfig(bits=4, group_size=16, num_samples=4, seq_len=24, own_samples=8)
    report = quantize(tiny_model("llama"), config, IDS, device="cpu")
    assert report.calibration.startswith("12 samples x 24 = 288 tokens from token ids, the model going on")
    assert {layer.tokens for layer in report.layers} == {288}
