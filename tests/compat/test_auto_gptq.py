"""AutoGPTQ's scripts with one changed import, on a tiny model in place of the real ones."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    TextGenerationPipeline,
)

import woq
from woq.compat.auto_gptq import AutoGPTQForCausalLM, BaseGPTQForCausalLM, BaseQuantizeConfig
from woq.compat.auto_gptq.eval_tasks import (
    LanguageModelingTask,
    SequenceClassificationTask,
    TextSummarizationTask,
)
from woq.configs import ConfigWarning
from woq.errors import CalibrationError, CheckpointError, ConfigError
from woq.evaluation.tasks import closest, edit_distance
from woq.linear import QuantLinear

pytestmark = pytest.mark.filterwarnings("ignore::woq.calibration.CalibrationWarning")


@pytest.fixture
def source(stories260k: Path, tmp_path: Path) -> Path:
    """A folder with a random Llama and a tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "float")
    for file in stories260k.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "float")
    return tmp_path / "float"


def test_the_quick_tour(source: Path, tmp_path: Path) -> None:
    """The calls of AutoGPTQ's README in their order; the model, the sizes and the device are this machine's."""
    pretrained, quantized = str(source), str(tmp_path / "4bit")
    tokenizer = AutoTokenizer.from_pretrained(pretrained, use_fast=True)
    examples = [tokenizer("once upon a time there was a little dog who liked to read")]
    quantize_config = BaseQuantizeConfig(bits=4, group_size=32, desc_act=False)
    model = AutoGPTQForCausalLM.from_pretrained(pretrained, quantize_config)
    model.quantize(examples)
    model.save_quantized(quantized)
    model.save_quantized(quantized, use_safetensors=True)
    assert (tmp_path / "4bit/quantize_config.json").exists()
    expected = model(torch.tensor([[5, 6, 7]])).logits
    model = AutoGPTQForCausalLM.from_quantized(quantized, device="cpu")
    torch.testing.assert_close(model(torch.tensor([[5, 6, 7]])).logits, expected, atol=1e-4, rtol=1e-4)
    asked = tokenizer("once upon", return_tensors="pt", return_token_type_ids=False).to(model.device)
    assert tokenizer.decode(model.generate(**asked, max_new_tokens=4)[0])
    pipeline = TextGenerationPipeline(model=model, tokenizer=tokenizer)
    assert pipeline("once upon", max_new_tokens=4)[0]["generated_text"].startswith("once upon")
    assert model.quantized and model.quantize_config.bits == 4 and model.quantize_config.group_size == 32
    assert BaseQuantizeConfig.from_pretrained(quantized).group_size == 32


class OPTGPTQForCausalLM(BaseGPTQForCausalLM):
    """As the README customizes a model, with one linear left out."""

    layers_block_name = "model.decoder.layers"
    outside_layer_modules = ["model.decoder.embed_tokens", "model.decoder.final_layer_norm"]  # noqa: RUF012
    inside_layer_modules = [  # noqa: RUF012
        ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"], ["self_attn.out_proj"], ["fc1"],
    ]  # fmt: skip


def test_a_class_of_ones_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    OPTForCausalLM(OPTConfig(vocab_size=128, word_embed_proj_dim=64, **sizes)).save_pretrained(
        tmp_path / "opt"
    )
    model = OPTGPTQForCausalLM.from_pretrained(tmp_path / "opt", BaseQuantizeConfig(group_size=32))
    examples = [{"input_ids": list(range(3, 20 + i)), "attention_mask": [1] * (17 + i)} for i in range(3)]
    model.quantize(examples, batch_size=2)
    quantized = {n.rpartition("layers.0.")[2] for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert {"self_attn.out_proj", "fc1"} < quantized and "fc2" not in quantized
    config = model.quantization_report.plan
    assert all(reason == "not in modules_in_block_to_quantize" for reason in config.skipped.values())
    assert any(spec.desc_act for spec in config.specs.values())  # AutoGPTQ's default


def test_what_has_no_counterpart(source: Path, tmp_path: Path) -> None:
    model = AutoGPTQForCausalLM.from_pretrained(source, BaseQuantizeConfig(group_size=32, desc_act=False))
    with pytest.raises(CalibrationError, match="no examples"):
        model.quantize([])
    with pytest.raises(ConfigError, match=r"quantize takes no \['autotune'\]"):
        model.quantize([{"input_ids": [3, 4]}], autotune=True)
    with pytest.warns(ConfigWarning, match="use_cuda_fp16=False does nothing"):
        model.quantize([{"input_ids": [3, 4, 5, 6]}], use_cuda_fp16=False)
    with pytest.raises(ConfigError, match="quantized already"):
        model.quantize([{"input_ids": [3, 4, 5, 6]}])
    with pytest.warns(ConfigWarning, match="nothing is pickled"):
        model.save_quantized(tmp_path / "w4", use_safetensors=False)
    load = partial(AutoGPTQForCausalLM.from_quantized, tmp_path / "w4", device="cpu")
    with pytest.warns(
        ConfigWarning, match="inject_fused_attention=True does nothing: modules are never fused"
    ):
        load(inject_fused_attention=True, trainable=True, disable_exllama=True)
    with pytest.raises(ConfigError, match="give one of the two"):
        load(device_map="auto")
    with pytest.raises(CheckpointError, match=r"no file gptq_model-4bit\.safetensors"):
        load(model_basename="gptq_model-4bit")
    with pytest.raises(ConfigError, match=r"from_pretrained takes no \['use_exllama'\]"):
        load(use_exllama=True)
    with pytest.raises(ConfigError, match="'marlin'"):
        BaseQuantizeConfig(checkpoint_format="marlin")
    with pytest.raises(ConfigError, match="bits = 9"):
        BaseQuantizeConfig(bits=9)


# --- tasks -------------------------------------------------------------------------------------------------------

TABLE = {
    "text": [f"the {w} dog" for w in ("big", "red", "sad", "old", "little", "happy")],
    "label": [0, 1, 0, 1, 0, 1],
}
LABELS = ["bad", "good"]


def refactor(samples: dict[str, list[Any]]) -> dict[str, list[str]]:
    """As the README's example does it."""
    return {
        "prompt": [f"Text: {text}\nAnswer:" for text in samples["text"]],
        "label": [LABELS[i] for i in samples["label"]],
    }


DATA = {"load_fn": lambda name: TABLE, "preprocess_fn": refactor}
NAMES = {"data_name_or_path": "mine", "prompt_col_name": "prompt", "label_col_name": "label"}


@pytest.fixture
def both(source: Path) -> tuple[Any, Any]:
    model = woq.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=woq.RtnConfig(group_size=32, device="cpu"), device_map="cpu"
    )
    return model, AutoTokenizer.from_pretrained(source)


def test_classification(both: tuple[Any, Any]) -> None:
    model, tokenizer = both
    task = SequenceClassificationTask(
        model=model, tokenizer=tokenizer, classes=LABELS, **NAMES, **DATA, num_samples=4, block_max_len=64
    )
    assert sum(len(batch.labels) for batch in task.batches) == 4
    assert all(batch.input_ids.numel() <= 64 for batch in task.batches)
    assert task.run()["acc"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    config = GenerationConfig(num_beams=3, num_return_sequences=3, do_sample=True)
    assert 0 <= task.run(generation_config=config)["acc"] <= 1
    assert config.max_new_tokens is None  # the user's own is left alone


def test_self_consistency_counts_votes(both: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = both
    task = SequenceClassificationTask(model, tokenizer, LABELS, **NAMES, **DATA, num_samples=6)
    said = {"bad": ["good", "bd", "Bad "], "good": ["bad", "bad", "gud"]}
    monkeypatch.setattr(task, "_generated", lambda batch, _: [said[label] for label in batch.labels])
    assert task.run() == {"acc": 0.5}  # "bad" is found twice of three; "good" is outvoted


def test_language_modeling_is_the_labels_perplexity(both: tuple[Any, Any]) -> None:
    model, tokenizer = both
    task = LanguageModelingTask(model, tokenizer, **NAMES, **DATA, sample_max_len=64)
    losses, count = 0.0, 0
    for text, label in zip(TABLE["text"], TABLE["label"], strict=True):  # one by one, without padding
        prompt = tokenizer(f"Text: {text}\nAnswer:")["input_ids"]
        wanted = tokenizer(LABELS[label])["input_ids"]
        ids = torch.tensor([prompt + wanted])
        targets = torch.tensor([[-100] * len(prompt) + wanted])
        losses += model(ids, labels=targets).loss.item() * len(wanted)
        count += len(wanted)
    assert task.run()["ppl"] == pytest.approx(torch.tensor(losses / count).exp().item(), rel=1e-3)


def test_summaries(both: tuple[Any, Any]) -> None:
    model, tokenizer = both
    pytest.importorskip("rouge")
    task = TextSummarizationTask(model, tokenizer, **NAMES, **DATA, num_samples=2, add_eos_token=True)
    scores = task.run(GenerationConfig(max_new_tokens=4))
    assert {"rouge-1", "rouge-2", "rouge-l"} == scores.keys()


def test_lengths(both: tuple[Any, Any]) -> None:
    model, tokenizer = both
    make = partial(LanguageModelingTask, model, tokenizer, **NAMES, **DATA)
    short = make(sample_max_len=8)
    assert all(batch.input_ids.shape[1] == 8 for batch in short.batches)
    with pytest.raises(ConfigError, match="no sample is left"):
        make(sample_max_len=3, truncate_prompt=False)
    with pytest.raises(ConfigError, match=r"takes no \['sample_len'\]"):
        make(sample_len=3)
    with pytest.raises(ConfigError, match=r"no column \['answer'\]"):
        LanguageModelingTask(model, tokenizer, "mine", "prompt", "answer", **DATA)
    with pytest.raises(ConfigError, match="are no class"):
        SequenceClassificationTask(model, tokenizer, ["yes", "no"], **NAMES, **DATA)


def test_edit_distance() -> None:
    assert [edit_distance(*p) for p in (("", "abc"), ("kitten", "sitting"), ("a", "a"))] == [3, 3, 0]
    assert closest("positve", ["negative", "positive"]) == "positive"
