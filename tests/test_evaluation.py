"""Perplexity and divergence against the definitions written out naively, and the published number on real data."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.tiny_models import TINY_ARCHITECTURES, VOCABULARY
from woq.errors import ConfigError, WoqError
from woq.evaluation import compare, perplexity, windows_from_text


@pytest.fixture
def windows(rng: torch.Generator) -> Tensor:
    return torch.randint(3, VOCABULARY, (5, 20), generator=rng)


def disturbed(model: nn.Module, by: float = 0.05) -> nn.Module:
    """A copy with noise on every parameter: something to diverge."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += by * torch.randn_like(parameter)
    return other


def log_probabilities(model: nn.Module, windows: Tensor) -> Tensor:
    """float64 [n, L-1, V], one window at a time."""
    with torch.no_grad():
        return torch.cat([model(w[None]).logits[:, :-1].double().log_softmax(-1) for w in windows])


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_perplexity_is_its_definition(
    arch: str, tiny_model: Callable[[str], nn.Module], windows: Tensor
) -> None:
    model = tiny_model(arch)
    nll = -log_probabilities(model, windows).gather(-1, windows[:, 1:, None]).mean().item()
    found = perplexity(model, windows.int(), batch_size=2)
    assert found.nll == pytest.approx(nll, rel=1e-5)
    assert found.value == pytest.approx(math.exp(nll), rel=1e-5)
    assert found.tokens == 5 * 19


@pytest.mark.parametrize("chunk", [1, 1000, 2**20])
def test_compare_is_its_definition(
    chunk: int,
    tiny_model: Callable[[str], nn.Module],
    windows: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("woq.evaluation.windows.CHUNK_ELEMENTS", chunk)
    reference = tiny_model("llama")
    model = disturbed(reference)
    p, q = log_probabilities(reference, windows), log_probabilities(model, windows)
    found = compare(model, reference, windows, batch_size=2)
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert found.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert 0 < found.top1_agreement < 1
    assert found.tokens == 5 * 19
    for side, one in ((found.perplexity, model), (found.reference_perplexity, reference)):
        assert side.nll == pytest.approx(perplexity(one, windows).nll, rel=1e-6)


def test_a_model_does_not_diverge_from_itself(
    tiny_model: Callable[[str], nn.Module], windows: Tensor
) -> None:
    model = tiny_model("gemma3").train()
    found = compare(model, model, windows)
    assert found.kl == 0
    assert found.top1_agreement == 1
    assert model.training, "the model's own mode comes back"


def test_batch_size_changes_nothing_and_progress_ends(
    tiny_model: Callable[[str], nn.Module], windows: Tensor
) -> None:
    model, told = tiny_model("mixtral"), []
    one = perplexity(model, windows, batch_size=1)
    all_at_once = perplexity(model, windows, batch_size=100)
    compare(model, model, windows, batch_size=2, progress=lambda *at: told.append(at))
    assert one.nll == pytest.approx(all_at_once.nll, rel=1e-6)
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_a_hopeless_model_is_infinitely_perplexed(
    tiny_model: Callable[[str], nn.Module], windows: Tensor
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight *= 1e5
    found = perplexity(model, windows)
    assert found.value == math.inf
    assert 709 < found.nll < math.inf


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(5, dtype=torch.int64), r"int64 \[5\]"),
        (torch.zeros(0, 5, dtype=torch.int64), r"\[0, 5\]"),
        (torch.zeros(2, 1, dtype=torch.int64), r"\[2, 1\]"),
        (torch.zeros(2, 5), "float32"),
        (torch.full((2, 5), VOCABULARY), f"from {VOCABULARY} to {VOCABULARY}, the model's vocabulary has {VOCABULARY}"),
        (torch.full((2, 5), -1), "from -1"),
    ],
)  # fmt: skip
def test_unusable_windows(wrong: Tensor, message: str, tiny_model: Callable[[str], nn.Module]) -> None:
    with pytest.raises(ConfigError, match=message):
        perplexity(tiny_model("llama"), wrong)


def test_predictions_that_are_not_finite_are_an_error(
    tiny_model: Callable[[str], nn.Module], windows: Tensor
) -> None:
    model = tiny_model("llama")
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.embed_tokens.weight[windows[3, 4]] = float("nan")
    first = int((windows[:, :-1] == windows[3, 4]).any(1).nonzero()[0])
    with pytest.raises(WoqError, match=f"window {first}, position .*: the likelihood is not finite"):
        perplexity(broken, windows, batch_size=2)
    with pytest.raises(WoqError, match=f"window {first}, .*: the likelihood"):
        compare(broken, model, windows, batch_size=2)
    with pytest.raises(WoqError, match=f"window {first}, .*: the reference model's likelihood"):
        compare(model, broken, windows, batch_size=2)


def test_vocabularies_must_agree(tiny_model: Callable[[str], nn.Module], windows: Tensor) -> None:
    wider = tiny_model("llama")
    wider.resize_token_embeddings(VOCABULARY + 32, mean_resizing=False)
    with pytest.raises(
        ConfigError, match=f"vocabularies differ: model {VOCABULARY + 32}, reference {VOCABULARY}"
    ):
        compare(wider, tiny_model("llama"), windows)


class Letters:
    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}


def test_windows_from_text() -> None:
    assert windows_from_text("abcdefgh", Letters(), 3).tolist() == [[97, 98, 99], [100, 101, 102]]
    with pytest.raises(ConfigError, match="8 tokens, one window takes 9"):
        windows_from_text("abcdefgh", Letters(), 9)
    with pytest.raises(ConfigError, match="seq_len=1"):
        windows_from_text("abcdefgh", Letters(), 1)


@pytest.mark.parametrize(
    ("count", "expected"), [(20, 9.4738), pytest.param(403, 7.5245, marks=pytest.mark.slow)]
)
def test_published_protocol_on_stories15m(
    count: int, expected: float, stories15m: Path, shared_dir: Path
) -> None:
    """All 403 windows are the protocol's number; the first 20 are this code's own, to notice a change early."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(stories15m, dtype=torch.float32)
    test = load_file(shared_dir / "data/quality/stories15M.safetensors")["test"]
    found = perplexity(model, test[:count])
    assert found.tokens == count * 255
    assert found.value == pytest.approx(expected, abs=2e-4)
