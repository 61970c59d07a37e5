"""Folds on real architectures: which there are, that they change nothing in the model, and that wrong ones are refused."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import MORE_ARCHITECTURES, TINY_ARCHITECTURES, VOCABULARY
from woq.blocks import find_blocks, linears, weight_of
from woq.calibration import Batch
from woq.capture import capture
from woq.errors import ConfigError
from woq.folds import Fold, FoldFinder, Folds
from woq.folds.proof import Bench
from woq.moe import unfuse_experts
from woq.replay import BlockCall, BlockInputs, advance

CPU = torch.device("cpu")
ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {**TINY_ARCHITECTURES, **MORE_ARCHITECTURES}

# In the last block: producer -> consumers, by the last part of their names; experts' as "expert".
FOUND: dict[str, dict[str, str]] = {
    "llama": {
        "input_layernorm": "q_proj k_proj v_proj",
        "v_proj": "o_proj",
        "post_attention_layernorm": "gate_proj up_proj",
        "up_proj": "down_proj",
    },
    "gpt2": {"ln_1": "c_attn", "c_attn": "c_proj", "ln_2": "c_fc"},  # fc -> GELU -> proj is refused
    "opt": {
        "self_attn_layer_norm": "q_proj k_proj v_proj",
        "v_proj": "out_proj",
        "final_layer_norm": "fc1",
        "fc1": "fc2",  # through ReLU
    },
    "gemma3": {
        "input_layernorm": "q_proj k_proj v_proj",
        "v_proj": "o_proj",
        "pre_feedforward_layernorm": "gate_proj up_proj",
        "up_proj": "down_proj",
    },
    "mixtral": {
        "input_layernorm": "q_proj k_proj v_proj",
        "v_proj": "o_proj",
        "post_attention_layernorm": "gate_up_proj gate_up_proj gate_up_proj gate_up_proj",
        "gate_up_proj": "down_proj",
    },
    "olmo2": {"v_proj": "o_proj", "up_proj": "down_proj"},  # its norms come after
    "olmo": {"v_proj": "o_proj", "up_proj": "down_proj"},  # its norms have no weights
    "phi3": {
        "input_layernorm": "qkv_proj",
        "qkv_proj": "o_proj",
        "post_attention_layernorm": "gate_up_proj",
        "gate_up_proj": "down_proj",
    },
    "gpt_neox": {"input_layernorm": "query_key_value", "post_attention_layernorm": "dense_h_to_4h"},
    "bloom": {"input_layernorm": "query_key_value", "post_attention_layernorm": "dense_h_to_4h"},
    "cohere": {
        "input_layernorm": "q_proj k_proj v_proj gate_proj up_proj",
        "v_proj": "o_proj",
        "up_proj": "down_proj",
    },
}
FOUND["qwen3"] = FOUND["llama"]


def prepared(arch: str) -> tuple[Any, nn.ModuleList, Tensor, list[BlockInputs]]:
    """A model whose norms are no longer trivial, its blocks, ids, and every block's inputs (hidden states shared)."""
    model = ARCHITECTURES[arch]()
    generator = torch.Generator().manual_seed(5)
    _, blocks = find_blocks(model)
    unfuse_experts(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.3 * noise if "weight" in name else 0.1 * noise)
    ids = torch.randint(3, VOCABULARY, (4, 24), generator=generator)
    found = capture(model, blocks, [Batch(ids, None)], CPU)
    inputs, hidden = [], found.hidden
    for block, calls in zip(blocks, found.calls, strict=True):
        inputs.append(BlockInputs(CPU, hidden, calls, [None]))
        hidden = advance(block, inputs[-1], CPU)
    return model, blocks, ids, inputs


def all_folds(blocks: nn.ModuleList, inputs: list[BlockInputs], finder: FoldFinder) -> list[Folds]:
    return [finder.find(b, list(linears(b)), i) for b, i in zip(blocks, inputs, strict=True)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_folds_change_nothing_in_the_model(arch: str) -> None:
    """All folds of all blocks at once, at strong random scales: the same logits. Finding them leaves no trace."""
    model, blocks, ids, inputs = prepared(arch)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        expected = model(ids).logits
    folds = all_folds(blocks, inputs, FoldFinder({}))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    generator = torch.Generator().manual_seed(0)
    for block, found in zip(blocks, folds, strict=True):
        assert found.kept
        for fold in found.kept:
            fold.apply(block, torch.exp(torch.randn(fold.channels, generator=generator)))
    with torch.no_grad():
        got = model(ids).logits
    assert float((got - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    moved = [name for name, t in model.state_dict().items() if not torch.equal(t, before[name])]
    assert len(moved) >= 3 * len(blocks)
    for block, found in zip(blocks, folds, strict=True):  # each linear is folded, or it is said why not
        folded = {name for fold in found.kept for name in fold.consumers}
        assert folded.isdisjoint(found.refused)
        assert folded | found.refused.keys() >= set(linears(block)) - {"mlp.shared_expert_gate"}


@pytest.mark.parametrize("arch", FOUND)
def test_which_folds_are_found(arch: str) -> None:
    _, blocks, _, inputs = prepared(arch)
    got = {}
    for fold in all_folds(blocks, inputs, FoldFinder({}))[-1].kept:
        consumers = " ".join(name.rpartition(".")[2] for name in fold.consumers)
        got[fold.producer.rpartition(".")[2]] = consumers
    assert got == FOUND[arch]


def last(arch: str) -> tuple[nn.Module, BlockInputs, Folds]:
    _, blocks, _, inputs = prepared(arch)
    return blocks[-1], inputs[-1], all_folds(blocks, inputs, FoldFinder({}))[-1]


def fold_of(folds: Folds, consumer: str) -> Fold:
    return next(f for f in folds.kept if any(name.endswith(consumer) for name in f.consumers))


def test_norms_that_multiply_by_one_plus_weight_are_told_apart() -> None:
    block, inputs, folds = last("gemma3")
    assert {fold.form for fold in folds.kept} == {"offset norm", "rows"}
    fold = fold_of(folds, "q_proj")
    naive = Fold(fold.producer, "norm", fold.consumers, (), 0, fold.channels, fold.source)
    with torch.no_grad():
        assert Bench(block, inputs).proves([fold])
        assert not Bench(block, inputs).proves([naive])


def test_grouped_heads_share_their_scales() -> None:
    """4 query heads over 2 of 16 channels: query head 0 and 1 read head 0's rows."""
    _, _, folds = last("llama")
    fold = fold_of(folds, "o_proj")
    head = torch.arange(16)
    assert fold.channels == 32
    assert fold.source.tolist() == torch.cat([head, head, head + 16, head + 16]).tolist()
    assert fold.shared(torch.arange(64.0)).tolist() == [(c % 16) + 32 * (c // 16) + 8 for c in range(32)]


def test_fused_projections_give_their_part() -> None:
    _, _, folds = last("phi3")
    values, up = fold_of(folds, "o_proj"), fold_of(folds, "down_proj")
    assert (values.start, values.channels) == (96, 32)  # 4 q heads, 2 k heads, 2 v heads of 16
    assert (up.start, up.channels) == (96, 96)  # behind the gate


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3"])
def test_a_norm_before_experts_takes_the_router_along(arch: str) -> None:
    block, inputs, folds = last(arch)
    fold = fold_of(folds, "experts.0.gate_up_proj")
    assert fold.producer == "post_attention_layernorm"
    assert fold.parameters == ("mlp.gate.weight",)
    alone = Fold(fold.producer, fold.form, fold.consumers, (), 0, fold.channels, fold.source)
    with torch.no_grad():
        assert not Bench(block, inputs).proves([alone])  # without it tokens go elsewhere


def test_reasons_of_refusals() -> None:
    assert last("gpt2")[2].refused == {"mlp.c_proj": "no row of c_fc scales it"}
    refused = last("olmo2")[2].refused
    assert refused["self_attn.q_proj"] == "it takes the block's input, which nothing inside the block makes"
    assert refused["mlp.up_proj"] == "no norm with a weight and no linear beside it makes it"


def test_a_block_of_the_same_make_is_proven_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, blocks, _, inputs = prepared("llama")
    asked: list[int] = []
    real = Bench.proves
    monkeypatch.setattr(Bench, "proves", lambda self, folds: asked.append(len(folds)) or real(self, folds))
    finder = FoldFinder({})
    all_folds(blocks, inputs, finder)
    assert asked == [1, 1, 1, 1, 4]
    blocks[1].mlp.act_fn = nn.Identity()  # type: ignore[union-attr, assignment]
    blocks[1].mlp.forward = lambda x: nn.functional.gelu(x) @ torch.ones(64, 64)  # type: ignore[union-attr, assignment]
    asked.clear()
    found = finder.find(blocks[1], list(linears(blocks[1])), inputs[1])
    assert 4 not in asked  # it saw that linears no longer run, and looked anew
    assert {f.producer for f in found.kept} == {"input_layernorm", "self_attn.v_proj"}
    assert found.refused["mlp.up_proj"] == "no token of the sample that folds are proven on reached it"


# --- what must be refused ---------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """norm -> up -> down with a twist."""

    def __init__(self, twist: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.twist = twist
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        if twist == "tied":
            self.down = nn.Linear(32, 32)
            self.up = nn.Linear(32, 32)
            self.down.weight = self.up.weight

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.norm(hidden)
        up = self.up(x)
        if self.twist == "softplus":
            up = nn.functional.softplus(up)
        if self.twist == "mixing":
            up = up + up.roll(1, dims=-1)
        if self.twist == "norm used twice":
            return hidden + self.down(up) + 0.01 * x
        if self.twist == "up used twice":
            return hidden + self.down(up) + 0.01 * up[..., :32]
        if self.twist == "down used twice":
            return hidden + self.down(up) + self.down(up.sigmoid())
        if self.twist == "sinks":
            return hidden + 0 * self.down(up)
        return hidden + self.down(up)


@pytest.mark.parametrize(
    ("twist", "producers"),
    [
        ("none", ["norm", "up"]),
        ("softplus", ["norm"]),
        ("mixing", ["norm"]),
        ("norm used twice", ["up"]),
        ("up used twice", ["norm"]),
        ("down used twice", ["norm"]),
        ("sinks", []),
        ("tied", []),
    ],
)
def test_twists(twist: str, producers: list[str], rng: torch.Generator) -> None:
    """Each twist makes one fold wrong, by little: it alone is refused."""
    block = Toy(twist)
    hidden = torch.randn(2, 20, 32, generator=rng)
    inputs = BlockInputs(CPU, [hidden], [BlockCall((), {})], [None])
    folds = FoldFinder({}).find(block, ["up", "down"], inputs)
    assert [fold.producer for fold in folds.kept] == producers


def test_the_head_alone_has_no_fold(rng: torch.Generator) -> None:
    head = nn.Linear(32, 48)
    inputs = BlockInputs(CPU, [torch.randn(2, 5, 32, generator=rng)], [BlockCall((), {})], [None])
    assert FoldFinder({}).find(head, [""], inputs).refused.keys() == {""}


def test_low_precision_blocks_are_proven_in_float32_and_fold_exactly() -> None:
    """The norm's new weight is a bfloat16 number: what rounding took from it, s puts into the consumers."""
    model, blocks, _, inputs = prepared("llama")
    model.bfloat16()
    low = BlockInputs(CPU, [h.bfloat16() for h in inputs[0].hidden], inputs[0].calls, [None])
    for call in low.calls:
        call.kwargs["position_embeddings"] = tuple(t.bfloat16() for t in call.kwargs["position_embeddings"])
    folds = FoldFinder({}).find(blocks[0], list(linears(blocks[0])), low)
    assert len(folds.kept) == 4
    fold = folds.kept[0]
    norm, q = blocks[0].get_submodule(fold.producer), blocks[0].get_submodule(fold.consumers[0])
    old_norm, old_q = norm.weight.float().clone(), weight_of(q).float().clone()  # type: ignore[arg-type, union-attr, operator]
    s = fold.apply(blocks[0], torch.rand(fold.channels) + 0.5)
    new_norm = norm.weight.float()  # type: ignore[operator, union-attr]
    assert torch.equal(new_norm.bfloat16().float(), new_norm)
    assert torch.allclose(new_norm * s, old_norm, rtol=1e-6)
    assert torch.allclose(weight_of(q).float(), old_q * s, rtol=2**-8)  # type: ignore[arg-type]


def test_a_channel_that_is_zero_stays(rng: torch.Generator) -> None:
    block = Toy("none")
    with torch.no_grad():
        block.norm.weight[3] = 0
    fold = Fold("norm", "norm", ("up",), (), 0, 32, torch.arange(32))
    before = block(torch.randn(1, 4, 32, generator=rng.manual_seed(1)))
    s = fold.apply(block, torch.full((32,), 2.0))
    assert s[3] == 1 and s[2] == 2
    assert torch.allclose(block(torch.randn(1, 4, 32, generator=rng.manual_seed(1))), before, atol=1e-5)


# --- a given table ----------------------------------------------------------------------------------------------------


def test_a_given_table_is_used_and_still_proven() -> None:
    _, blocks, _, inputs = prepared("llama")
    names = list(linears(blocks[0]))
    table = {"mlp.up_proj": ["mlp.down_proj"], "mlp.gate_proj": ["mlp.down_proj"]}
    found = FoldFinder(table).find(blocks[0], names, inputs[0])
    assert [(f.producer, f.consumers) for f in found.kept] == [("mlp.up_proj", ("mlp.down_proj",))]
    assert found.refused["self_attn.q_proj"] == "absorb_layer_dict names no producer for it"
    partial = FoldFinder({"input_layernorm": ["self_attn.q_proj"]}).find(blocks[0], names, inputs[0])
    assert not partial.kept  # k and v take it too
    assert partial.refused["self_attn.q_proj"] == "scaling it and input_layernorm changes the block's output"


def test_a_given_router() -> None:
    _, blocks, _, inputs = prepared("mixtral")
    experts = [f"mlp.experts.{e}.gate_up_proj" for e in range(4)]
    table = {"post_attention_layernorm": [*experts, "mlp.gate.weight"]}
    found = FoldFinder(table).find(blocks[0], experts, inputs[0])
    assert [f.parameters for f in found.kept] == [("mlp.gate.weight",)]


@pytest.mark.parametrize(
    "table", [{"mlp.up_proj": ["mlp.down"]}, {"mlp.up": ["mlp.down_proj"]}], ids=["consumer", "producer"]
)
def test_a_wrong_name_in_a_table(table: dict[str, list[str]]) -> None:
    _, blocks, _, inputs = prepared("llama")
    with pytest.raises(ConfigError, match=r"absorb_layer_dict: 'mlp.up.* but the block has no 'mlp\."):
        FoldFinder(table).find(blocks[0], list(linears(blocks[0])), inputs[0])


def test_the_page_is_up_to_date() -> None:
    path = Path(__file__).resolve().parents[1] / "docs" / "generate_folds.py"
    spec = importlib.util.spec_from_file_location("generate_folds", path)
    assert spec is not None and spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    page = generator.PAGE.read_text()
    assert page == generator.generate(page), "run `python docs/generate_folds.py`"
