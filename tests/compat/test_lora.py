"""PEFT's LoRA on top of a quantized model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import woq
from woq.linear import QuantLinear

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
IDS = torch.arange(96).reshape(4, 24) % 120 + 3


def packed(model: nn.Module) -> list[torch.Tensor]:
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert layers
    return [tensor.clone() for layer in layers for tensor in layer.packed.tensors().values()]


def losses(model: Any, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    model.eval()
    return found


@pytest.mark.parametrize("door", [transformers.AutoModelForCausalLM, woq.AutoModelForCausalLM])
@pytest.mark.parametrize(
    ("arch", "targets"), [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn", "c_fc"])]
)
def test_lora_trains_saves_and_reloads(
    door: Any, arch: str, targets: list[str], tiny_model: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = tiny_model(arch)
    woq.quantize(model, woq.RtnConfig(bits=4, group_size=32, device="cpu"))
    woq.save_pretrained(model, tmp_path / "w4")
    tuned = peft.get_peft_model(
        door.from_pretrained(tmp_path / "w4", device_map="cpu"),
        peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"),
    )
    before = packed(tuned)
    found = losses(tuned, 8)
    assert found[-1] < 0.9 * found[0]
    assert all(torch.equal(a, b) for a, b in zip(before, packed(tuned), strict=True))
    tuned.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        door.from_pretrained(tmp_path / "w4", device_map="cpu"), tmp_path / "adapter"
    )
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, tuned(IDS).logits)
        with tuned.disable_adapter():
            torch.testing.assert_close(tuned(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)


def test_it_trains_in_bfloat16_after_preparing(
    tiny_model: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    woq.quantize(model, woq.RtnConfig(bits=4, group_size=32, device="cpu"))
    woq.save_pretrained(model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ready = peft.prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=True)
    tuned = peft.get_peft_model(
        ready, peft.LoraConfig(r=4, target_modules=["up_proj"], task_type="CAUSAL_LM")
    )
    found = losses(tuned, 4)
    assert found[-1] < found[0]
    with pytest.raises(ValueError, match="DoRA"):
        peft.get_peft_model(tuned.unload(), peft.LoraConfig(use_dora=True, target_modules=["q_proj"]))
