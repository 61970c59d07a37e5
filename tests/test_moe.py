"""Fused experts taken apart compute the same, and count exactly the tokens that reach them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import VOCABULARY
from woq import GPTQConfig, quantize
from woq.algorithms.hessian import FEW_TOKENS
from woq.blocks import find_blocks, linears
from woq.calibration import Batch
from woq.capture import capture
from woq.moe import UnfusedExperts, expert_linears, is_fused_experts, unfuse_experts
from woq.replay import BlockInputs, observe

TinyModel = Callable[[str], nn.Module]
ARCHITECTURES = ("mixtral", "qwen3_moe")


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if is_fused_experts(m)}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_same_function(arch: str, tiny_model: TinyModel, rng: torch.Generator) -> None:
    model = tiny_model(arch)
    model.set_experts_implementation("eager")
    ids = torch.randint(3, VOCABULARY, (2, 20), generator=rng)
    with torch.no_grad():
        before = model(ids).logits
        number = len(fused_experts(model))
        assert number == (2 if arch == "mixtral" else 1)  # qwen3_moe's first block is dense
        unfuse_experts(model)
        after = model(ids).logits
    assert not fused_experts(model)
    assert sum(isinstance(m, UnfusedExperts) for m in model.modules()) == number
    assert torch.allclose(before, after, rtol=1e-5, atol=1e-5)


class Fused(nn.Module):
    """Fused experts as transformers' flags describe them, in every variant, and their plain meaning."""

    def __init__(self, has_gate: bool, has_bias: bool, is_transposed: bool) -> None:
        super().__init__()
        self.has_gate, self.has_bias, self.is_transposed = has_gate, has_bias, is_transposed
        self.num_experts, hidden, inner = 3, 8, 6
        self.act_fn = nn.SiLU()
        up = 2 * inner if has_gate else inner
        shapes = {("gate_up_proj" if has_gate else "up_proj"): (up, hidden), "down_proj": (hidden, inner)}
        for name, (rows, columns) in shapes.items():
            shape = (3, columns, rows) if is_transposed else (3, rows, columns)
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
            if has_bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(3, rows)))

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def project(self, name: str, expert: int, x: Tensor) -> Tensor:
        weight = getattr(self, name)[expert]
        y = x @ (weight if self.is_transposed else weight.t())
        return y + getattr(self, f"{name}_bias")[expert] if self.has_bias else y

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for t in range(len(x)):
            for slot in range(index.shape[1]):
                e = int(index[t, slot])
                up = self.project("gate_up_proj" if self.has_gate else "up_proj", e, x[t : t + 1])
                inner = self._apply_gate(up) if self.has_gate else self.act_fn(up)
                out[t] += weights[t, slot] * self.project("down_proj", e, inner)[0]
        return out


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_gate", [False, True])
def test_every_variant_the_flags_describe(
    has_gate: bool, has_bias: bool, is_transposed: bool, rng: torch.Generator
) -> None:
    fused = Fused(has_gate, has_bias, is_transposed)
    x = torch.randn(10, 8, generator=rng)
    index = torch.stack([torch.randperm(3, generator=rng)[:2] for _ in range(10)])
    weights = torch.rand(10, 2, generator=rng)
    with torch.no_grad():
        expected = fused(x, index, weights)
        holder = nn.ModuleDict({"experts": fused})
        unfuse_experts(holder)
        got = holder["experts"](x, index, weights)
    assert isinstance(holder["experts"], UnfusedExperts)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_the_linears_share_the_fused_memory() -> None:
    fused: Any = Fused(True, False, False)
    names = expert_linears(fused)
    assert list(names)[:2] == ["0.gate_up_proj", "0.down_proj"]
    with torch.no_grad():
        names["2.down_proj"].weight.fill_(7.0)
    assert (fused.down_proj[2] == 7.0).all()
    assert (fused.down_proj[1] != 7.0).any()


def test_a_class_without_the_flags_is_left_alone() -> None:
    fused = Fused(True, False, False)
    del fused.is_transposed
    assert not is_fused_experts(fused)
    holder = nn.ModuleDict({"experts": fused})
    unfuse_experts(holder)
    assert holder["experts"] is fused


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tokens_are_counted_per_expert(
    arch: str, padded: bool, tiny_model: TinyModel, rng: torch.Generator
) -> None:
    model = tiny_model(arch)
    ids = torch.randint(3, VOCABULARY, (2, 20), generator=rng)
    mask = torch.ones(2, 20, dtype=torch.bool)
    if padded:
        mask[1, 11:] = False
    batch = Batch(ids, mask if padded else None)
    _, blocks = find_blocks(model)
    last = len(blocks) - 1
    found = capture(model, blocks, [batch], torch.device("cpu"))
    block = blocks[last]
    unfuse_experts(block)
    inputs = BlockInputs(torch.device("cpu"), found.hidden, found.calls[last], [batch.attention_mask])
    rows: dict[str, int] = {}
    chosen: list[Tensor] = []
    experts = next(m for m in block.modules() if isinstance(m, UnfusedExperts))
    handle = experts.register_forward_pre_hook(lambda _, args: chosen.append(args[1]))
    names = [name for name in linears(block) if "experts" in name]
    observe(block, names, inputs, lambda name, x: rows.update({name: rows.get(name, 0) + len(x)}))
    handle.remove()
    counted = chosen[0][mask.flatten()]
    for name in names:
        expert = int(name.split(".")[-2])
        assert rows.get(name, 0) == int((counted == expert).sum()), name
    assert sum(rows.get(n, 0) for n in names if n.endswith("down_proj")) == 2 * batch.tokens
    assert experts.token_mask is None


def never_expert_3(model: nn.Module) -> None:
    """Let the routers send no token to expert 3."""

    def elsewhere(
        _: nn.Module, __: Any, output: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, index = output
        free = (
            torch.stack([(index != e).all(-1) for e in range(3)], dim=-1)
            .to(torch.int8)
            .argmax(-1, keepdim=True)
        )
        return logits, weights, torch.where(index == 3, free, index)

    routers = [m for m in model.modules() if type(m).__name__.endswith("TopKRouter")]
    assert routers
    for router in routers:
        router.register_forward_hook(elsewhere)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_an_expert_without_tokens_gains_by_its_siblings_moments(
    arch: str, tiny_model: TinyModel, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against rounding it to nearest: the error of its outputs on tokens that do reach it."""
    ids = torch.randint(3, VOCABULARY, (16, 48), generator=rng)
    plain = tiny_model(arch)
    unfuse_experts(plain)
    seen: dict[str, Tensor] = {}
    floats = {n: m for n, m in plain.named_modules() if ".experts.3." in n and isinstance(m, nn.Linear)}
    for name, linear in floats.items():
        linear.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        plain(torch.randint(3, VOCABULARY, (8, 48), generator=rng))
    error, config = {}, GPTQConfig(bits=3, group_size=32, num_samples=16, seq_len=48)
    for few in (FEW_TOKENS, 0):
        monkeypatch.setattr("woq.algorithms.hessian.FEW_TOKENS", few)
        model = tiny_model(arch)
        never_expert_3(model)
        report = quantize(model, config, [ids])
        rare = [layer for layer in report.layers if layer.layer in floats]
        assert len(rare) == len(floats) and all(layer.tokens == 0 for layer in rare)
        told = "filled up from the block's other experts" if few else "rounded to nearest"
        assert all(told in layer.note for layer in rare)
        assert list(report.note_counts.values()) == [len(rare)]
        error[few] = 0.0
        for name, linear in floats.items():
            off = seen[name] @ (linear.weight - model.get_submodule(name).dequantize()).t()
            error[few] += float(off.square().sum() / (seen[name] @ linear.weight.t()).square().sum())
    assert error[FEW_TOKENS] < error[0], error
