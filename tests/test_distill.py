"""Tuning end to end: closer to the float model, stored as trained, refused where it cannot be done."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import TINY_ARCHITECTURES, VOCABULARY
from woq import AutoModelForCausalLM, GPTQConfig, quantize, quantize_folder
from woq.errors import ConfigError
from woq.evaluation import compare

FEW: dict[str, Any] = {"bits": 2, "group_size": 32, "num_samples": 64, "seq_len": 24, "distill_lr": 0.01}


def text(model: Any, seed: int, rows: int = 64) -> torch.Tensor:
    """What the model itself says: a random model's own text is what it can be compared on."""
    torch.manual_seed(seed)
    start = torch.randint(3, VOCABULARY, (rows, 1))
    ids: torch.Tensor = model.generate(start, do_sample=True, max_new_tokens=23, min_new_tokens=23)
    return ids[:, :24]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("order", [{}, {"desc_act": True}], ids=["plain", "desc_act"])
def test_it_comes_closer_and_is_stored_as_trained(name: str, order: dict[str, Any], tmp_path: Path) -> None:
    model = TINY_ARCHITECTURES[name]()
    calib, test = text(model, 0), text(model, 1)
    divergence = {}
    for iters in (0, 40):
        work = copy.deepcopy(model)
        quantize(work, GPTQConfig(**FEW, **order, distill_iters=iters), calib, device="cpu")
        divergence[iters] = compare(work, model, test).kl
    assert divergence[40] < 0.97 * divergence[0]
    work.save_pretrained(tmp_path / name)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="float32")
        torch.testing.assert_close(again(test).logits, work(test).logits, rtol=1e-3, atol=1e-3)


def test_same_seed_same_bytes() -> None:
    model = TINY_ARCHITECTURES["llama"]()
    calib = text(model, 0, 16)
    stored = []
    for _ in range(2):
        work = copy.deepcopy(model)
        quantize(work, GPTQConfig(**{**FEW, "num_samples": 16}, distill_iters=5), calib, device="cpu")
        stored.append(work.state_dict())
    assert all(torch.equal(stored[0][key], stored[1][key]) for key in stored[0])
    asked = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in work.named_parameters() if p.requires_grad} <= asked
    assert all(p.grad is None for p in work.parameters())


def test_from_disk_to_disk_it_is_refused(tmp_path: Path) -> None:
    TINY_ARCHITECTURES["llama"]().save_pretrained(tmp_path / "float")
    with pytest.raises(ConfigError, match="distill_iters"):
        quantize_folder(
            tmp_path / "float",
            tmp_path / "out",
            GPTQConfig(**FEW, distill_iters=1),
            torch.zeros(4, 24).long(),
        )
    assert not (tmp_path / "out").exists()
