"""Calibration text that the model writes itself: instead of data, and beside it, where half goes on with tokens of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import TINY_ARCHITECTURES
from woq import CalibrationError, GPTQConfig, quantize
from woq.calibration import calibration_batches, sample_from_model
from woq.calibration.batches import Sample, openings_of
from woq.calibration.sampling import OPENING_TOKENS, _draw

EOS = 2
IDS = torch.arange(3, 99).view(4, 24)


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_self_sampling_leaves_model_and_random_state_alone(
    arch: str, tiny_model: Callable[[str], nn.Module]
) -> None:
    model = tiny_model(arch).train()
    state = torch.get_rng_state()
    options = {"num_samples": 6, "seq_len": 24}
    once, again = (sample_from_model(model, seed=0, **options) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert once.shape == (6, 24)
    assert torch.equal(once, again)
    assert not torch.equal(once, sample_from_model(model, seed=1, **options))
    assert (once[:, 0] == 1).all(), "rows begin with bos"
    assert len(once.unique(dim=0)) == 6


class WithoutCache(nn.Module):
    """A model that returns no key-value cache, like a recurrent one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(input_ids=input_ids, use_cache=False).logits)


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_self_sampling_does_not_depend_on_the_cache(
    arch: str, tiny_model: Callable[[str], nn.Module]
) -> None:
    model = tiny_model(arch)
    options: dict[str, Any] = {"num_samples": 3, "seq_len": 20, "seed": 0}
    assert torch.equal(sample_from_model(model, **options), sample_from_model(WithoutCache(model), **options))


def test_rows_side_by_side_change_nothing(
    tiny_model: Callable[[str], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    told: list[tuple[int, int]] = []
    options: dict[str, Any] = {"num_samples": 5, "seq_len": 16, "seed": 0}
    together = sample_from_model(model, **options)
    monkeypatch.setattr("woq.calibration.sampling.MAX_ROWS", 2)
    assert torch.equal(together, sample_from_model(model, progress=lambda *at: told.append(at), **options))
    assert told == sorted(told)
    assert told[-1] == (80, 80)


def test_a_document_that_ends_is_followed_by_a_new_one(tiny_model: Callable[[str], nn.Module]) -> None:
    ids = sample_from_model(tiny_model("llama"), num_samples=40, seq_len=60, seed=0)
    row, at = (ids[:, :-1] == EOS).nonzero(as_tuple=True)
    assert len(at) > 3, "this seed should end documents"
    assert (ids[row, at + 1] == 1).all()
    openings = torch.stack([ids[:, i] for i in range(1, 1 + OPENING_TOKENS)])
    assert not (openings == EOS).any()


def test_without_bos_rows_begin_at_random(tiny_model: Callable[[str], nn.Module]) -> None:
    model = tiny_model("qwen3")
    model.config.bos_token_id = model.generation_config.bos_token_id = None
    ids = sample_from_model(model, num_samples=20, seq_len=3, seed=0)
    assert len(ids[:, 0].unique()) > 10


def test_draws_follow_the_distribution() -> None:
    draws = 20_000
    logits = torch.tensor([0.0, 1.0, float("-inf"), 2.0, -1.0]).expand(draws, -1).clone()
    uniform = (torch.arange(draws) + 0.5) / draws
    nowhere = torch.zeros(draws, 1, dtype=torch.bool)
    drawn = _draw(logits, nowhere, torch.tensor([], dtype=torch.int64), uniform)
    frequency = torch.bincount(drawn, minlength=5) / draws
    torch.testing.assert_close(frequency, logits[0].softmax(-1), rtol=0, atol=2 / draws)
    assert frequency[2] == 0


def test_logits_that_are_not_finite_are_an_error(tiny_model: Callable[[str], nn.Module]) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="not finite after 1 tokens"):
        calibration_batches(model=model, num_samples=4, seq_len=8)


def test_own_text_is_likely_text(stories260k: Path) -> None:
    from transformers import AutoModelForCausalLM

    from woq.evaluation import perplexity

    model = AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32)
    (batch,) = calibration_batches(model=model, tokenizer=stories260k, num_samples=8, seq_len=64)
    assert batch.input_ids.shape == (8, 64)
    assert perplexity(model, batch.input_ids).value < 20  # of 512 tokens; random ids give thousands


# --- beside the data ------------------------------------------------------------------------------------------


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
    goes_on, *begin = more[2].input_ids[0], more[2].input_ids[1], more[3].input_ids[0]
    assert (goes_on[:12].diff() == 1).all(), "half of a sample, as the data has it"
    assert [row[0] for row in begin] == [1, 1], "as texts begin"
    with pytest.raises(CalibrationError, match="none was given"):
        calibration_batches(IDS, own_samples=3)


def test_quantizing_uses_and_reports_them(tiny_model: Callable[[str], nn.Module]) -> None:
    config = GPTQConfig(bits=4, group_size=16, num_samples=4, seq_len=24, own_samples=8)
    report = quantize(tiny_model("llama"), config, IDS, device="cpu")
    assert report.calibration.startswith("12 samples x 24 = 288 tokens from token ids, the model itself")
    assert {layer.tokens for layer in report.layers} == {288}
