"""Quantized input embeddings: the rows looked up are those of the whole, ties are cut and said, folders reload."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.test_weights import LAYOUTS, layout_name, other_kind, random_weight
from tests.tiny_models import TINY_ARCHITECTURES, VOCABULARY
from woq import AutoModelForCausalLM, GPTQConfig, RtnConfig, quantize, quantize_folder, save_pretrained
from woq.embedding import QuantEmbedding
from woq.errors import ConfigError, QuantizationError
from woq.inspection import inspect_folder
from woq.linear import QuantLinear
from woq.progress import Progress
from woq.scales import DoubleQuant
from woq.weights import DATA_TYPES, DataType, Layout

QUIET = Progress()
IDS = torch.arange(40).view(2, 20)
SAMPLES = torch.randint(3, VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.filterwarnings("ignore:.*samples:UserWarning")


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    result: Tensor = model(IDS).logits
    return result


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
def test_a_look_up_is_a_row_of_the_whole(layout: Layout) -> None:
    for bits, sym in ((2, True), (3, False), (8, False)):
        packed = random_weight((20, 80, 32), bits, sym, layout).pack()
        module = QuantEmbedding(packed, nn.Embedding(20, 80))
        ids = torch.tensor([[3, 0, 19], [7, 7, 1]])
        assert torch.equal(module(ids), packed.unpack().dequantize()[ids])
        assert module(ids[:, :0]).shape == (2, 0, 80)


@pytest.mark.parametrize("data_type", DATA_TYPES)
def test_every_data_type_and_dtype(data_type: DataType) -> None:
    packed = other_kind((20, 96, 32), data_type, LAYOUTS[1], DoubleQuant()).pack()
    module = QuantEmbedding(packed, nn.Embedding(20, 96)).to(torch.bfloat16)
    ids = torch.tensor([5, 19])
    assert torch.equal(module(ids), packed.unpack().dequantize(torch.bfloat16)[ids])
    twin = QuantEmbedding(packed.to("cpu"), nn.Embedding(20, 96))
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(ids).bfloat16(), module(ids))
    with pytest.raises(RuntimeError, match="qweight"):
        twin.load_state_dict({})


@pytest.mark.parametrize("head", [False, True], ids=["float head", "quantized head"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "opt"])
def test_a_folder_reloads_to_the_same_logits(arch: str, head: bool, tmp_path: Path) -> None:
    """gemma3 scales its embeddings; gpt2, gemma3 and opt tie the head to them."""
    plain: Any = TINY_ARCHITECTURES[arch]()
    tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    before: Any = TINY_ARCHITECTURES[arch]()
    config = RtnConfig(bits=8, group_size=32, quant_embeddings=True, quant_lm_head=head)
    report = quantize(before, config, device="cpu")
    embeddings = before.get_input_embeddings()
    assert isinstance(embeddings, QuantEmbedding)
    assert isinstance(before.get_output_embeddings(), QuantLinear) == head
    assert report.untied_head == tied and not (tied and before.config.tie_word_embeddings)
    assert 0 < report.layers[0].loss < 1e-3 and report.layers[0].layer == report.plan.embeddings
    assert 0 < (logits(before) - logits(plain)).norm() < 0.1 * logits(plain).norm()
    if not head:
        assert torch.equal(before.get_output_embeddings().weight, plain.get_output_embeddings().weight)
    save_pretrained(before, tmp_path / "m")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "m", device_map="cpu")
    assert isinstance(after.get_input_embeddings(), QuantEmbedding)
    assert torch.equal(logits(after), logits(before))
    raw = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert (raw["quant_method"], raw["woq"]["version"]) == (
        "woq",
        2,
    )  # no other reader, and none of version 1
    facts = inspect_folder(tmp_path / "m", device="cpu")
    assert sum(kind.layers for kind in facts.kinds) == len(report.plan.specs)
    assert [kind.layers for kind in facts.kinds if kind.backend == "look-up"] == [1]
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "m", device_map="cpu", dtype=torch.bfloat16)
    assert half.get_input_embeddings()(IDS).dtype == torch.bfloat16


def test_block_by_block_writes_the_same_and_calibrates_on_what_blocks_will_be_given(tmp_path: Path) -> None:
    config = GPTQConfig(
        bits=4, group_size=32, num_samples=8, seq_len=24, quant_embeddings=True, scale_dtype="fp16",
        overrides={r"model\.embed_tokens": {"bits": 2}},
    )  # fmt: skip
    TINY_ARCHITECTURES["llama"]().save_pretrained(tmp_path / "float")
    for offload in ("never", "always"):
        quantize_folder(
            tmp_path / "float", tmp_path / offload, config, [SAMPLES], offload=offload, progress=QUIET
        )
    model = TINY_ARCHITECTURES["llama"]()
    quantize(model, config, [SAMPLES], device="cpu")
    loaded = [
        AutoModelForCausalLM.from_pretrained(tmp_path / way, device_map="cpu") for way in ("never", "always")
    ]
    states = [m.state_dict() for m in (model, *loaded)]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[name], states[0][name]) for name in state)
    assert loaded[0].get_input_embeddings().packed.spec.bits == 2
    plain = TINY_ARCHITECTURES["llama"]()
    quantize(plain, config.model_copy(update={"quant_embeddings": False}), [SAMPLES], device="cpu")
    name = "model.layers.0.self_attn.q_proj.qweight"
    assert not torch.equal(plain.state_dict()[name], states[0][name])


class Doubled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def test_what_cannot_be_is_refused_before_anything_is_changed() -> None:
    model: Any = TINY_ARCHITECTURES["llama"]()
    with pytest.raises(ConfigError, match=r"quant_embeddings is set, but 'model\.embed_tokens' is ignored"):
        quantize(model, RtnConfig(group_size=32, quant_embeddings=True, ignore=("embed_tokens",)))
    with pytest.raises(ConfigError, match="quant_embeddings: group_size does not divide"):
        quantize(
            model, RtnConfig(group_size=32, quant_embeddings=True, overrides={".*embed": {"group_size": 48}})
        )
    model.model.embed_tokens = Doubled(VOCABULARY, 64)
    with pytest.raises(QuantizationError, match="a Doubled, do more than look up"):
        quantize(model, RtnConfig(group_size=32, quant_embeddings=True))
    model.model.embed_tokens = nn.Identity()
    with pytest.raises(QuantizationError, match=r"Identity, no nn\.Embedding"):
        quantize(model, RtnConfig(group_size=32, quant_embeddings=True))
