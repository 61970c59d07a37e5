"""GGUF: blocks against the gguf package's own dequantizer, whole files against transformers' reader."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.interop.folders import logits, make_folder
from tests.interop.foreign_writers import awq_gemm, gptq, random_plain
from tests.interop.test_layers import ours
from tests.tiny_models import GATED
from woq import AutoModelForCausalLM, RtnConfig, quantize_folder
from woq.errors import CheckpointError, ConfigError
from woq.inspection import inspect_folder
from woq.interop.convert import convert
from woq.interop.gguf_blocks import block_type, to_blocks, why_not
from woq.interop.gguf_tokenizer import PATTERNS, splitting
from woq.progress import Progress

gguf = pytest.importorskip("gguf")

SYM = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq_v2"}


@settings(max_examples=20, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([32, 64, -1]),
    sym=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blocks_mean_the_same_to_the_gguf_package(bits: int, group_size: int, sym: bool, seed: int) -> None:
    plain = random_plain(8, 192, bits=bits, group_size=group_size, sym=sym, seed=seed)
    weight = ours(plain)
    if bits == 8 and not sym:
        assert why_not(weight) == "8 bits with zero points: Q8_0 has none"
        return
    assert why_not(weight) is None
    kind = gguf.GGMLQuantizationType[block_type(weight)]
    got = torch.from_numpy(gguf.quants.dequantize(to_blocks(weight).numpy(), kind))
    expected = plain.dequantize()
    if sym:
        assert torch.equal(got, expected)
    else:  # the offset is rounded to float16
        torch.testing.assert_close(got, expected, rtol=0, atol=float(plain.scales.abs().max()) * 15 * 2**-11)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"bits": 3}, "3 bits"),
        ({"act_order": True}, "activation order"),
        ({"group_size": 16}, "group_size 16 is no multiple of 32"),
        ({"in_features": 80, "group_size": -1}, "in_features 80 is no multiple of 32"),
    ],
)
def test_refusals(fields: dict[str, Any], reason: str) -> None:
    told = why_not(ours(random_plain(8, fields.pop("in_features", 64), **fields)))
    assert told is not None and reason in told


def read(file: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(file, device_map="cpu", dtype=torch.float32)


def test_a_llama_with_grouped_heads(tmp_path: Path) -> None:
    """Two key heads for four query heads: both permutations of rows."""
    expected = make_folder(tmp_path / "source", lambda w: gptq(w, 0), config=SYM, sym=True)
    done = convert(tmp_path / "source", tmp_path / "model.gguf", "gguf")
    assert len(done.checked) == 8
    torch.testing.assert_close(logits(read(tmp_path / "model.gguf")), logits(expected), rtol=1e-4, atol=1e-4)
    facts = inspect_folder(tmp_path / "model.gguf")
    assert (facts.format, facts.architecture) == ("gguf", "llama")
    assert any("Q4_0" in name for name in facts.floats)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "source"]


SIZES: dict[str, Any] = {**GATED, "intermediate_size": 96}
LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
FAMILIES = {
    "mistral": transformers.MistralConfig(**SIZES),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=128),  # all that transformers' reader knows
    "llama, linear rope": transformers.LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    ),
    "llama, llama3 rope": transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_and_scaled_rotations(name: str, tmp_path: Path) -> None:
    """Quantized, converted and read back; transformers passes over what scales the rotations, we put it back."""
    torch.manual_seed(1)
    transformers.AutoModelForCausalLM.from_config(FAMILIES[name]).save_pretrained(tmp_path / "float")
    quantize_folder(tmp_path / "float", tmp_path / "ours", RtnConfig(group_size=32), progress=Progress())
    convert(tmp_path / "ours", tmp_path / "model.gguf", "gguf")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", device_map="cpu", dtype=torch.float32)
    model = read(tmp_path / "model.gguf")
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        model.model.rotary_emb.inv_freq, expected.model.rotary_emb.inv_freq, rtol=1e-4, atol=0
    )
    model.save_pretrained(tmp_path / "again")  # with the config that makes the same frequencies
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", device_map="cpu")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_reads_what_another_wrote(name: str, tmp_path: Path) -> None:
    """A file made with the gguf package alone: Q8_0 matrices, float32 vectors; Gemma's norms are stored plus one."""
    torch.manual_seed(2)
    head = {"head_dim": 16} if name == "gemma3" else {}
    config = {"qwen2": transformers.Qwen2Config, "gemma3": transformers.Gemma3TextConfig}[name](
        **SIZES, **head
    )
    model: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
    arch = next(arch for arch, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(16)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if name == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    tied = bool(config.tie_word_embeddings)
    for own, parameter in model.named_parameters():
        data = parameter.detach()
        if data.dim() == 2 and not own.startswith(("model.embed", "lm_head")):
            packed = gguf.quants.quantize(data.numpy(), gguf.GGMLQuantizationType.Q8_0)
            parameter.data = torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))
            writer.add_tensor(
                names.get_name(own, (".weight", ".bias")), packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0
            )
        elif not (tied and own.startswith("lm_head")):
            plus = 1.0 if name == "gemma3" and "norm" in own else 0.0
            writer.add_tensor(names.get_name(own, (".weight", ".bias")), (data + plus).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    got = read(tmp_path / "model.gguf")
    assert type(got) is type(model)
    torch.testing.assert_close(logits(got), logits(model), rtol=1e-4, atol=1e-4)


def test_rotations_that_are_not_read(tmp_path: Path) -> None:
    """A file that says something of its rotations that transformers passes over is refused."""
    make_folder(tmp_path / "source", lambda w: gptq(w, 0), config=SYM, sym=True)
    config = json.loads((tmp_path / "source/config.json").read_text())
    odd = {**LLAMA3, "high_freq_factor": 5.0, "low_freq_factor": 2.0, "original_max_position_embeddings": 64}
    for told, message in (
        (odd, "not as Llama 3 does"),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "scaled by 'yarn' are not read"),
    ):
        changed = {**config, "rope_parameters": told}
        (tmp_path / "source/config.json").write_text(json.dumps(changed))
        convert(tmp_path / "source", tmp_path / "x.gguf", "gguf", overwrite=True)
        file = tmp_path / "x.gguf"
        data = file.read_bytes()
        stated = len(b"linear").to_bytes(8, "little") + b"linear"
        if stated in data:  # as a file of another writer
            file.write_bytes(data.replace(stated, len(b"linear").to_bytes(8, "little") + b"yarn  "))
        with pytest.raises(CheckpointError, match=message.replace("'yarn'", "'yarn  '")):
            read(file)


def test_asymmetric_is_q4_1(tmp_path: Path) -> None:
    awq = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    expected = make_folder(tmp_path / "source", awq_gemm, config=awq)
    convert(tmp_path / "source", tmp_path / "model.gguf", "gguf")
    torch.testing.assert_close(logits(read(tmp_path / "model.gguf")), logits(expected), rtol=2e-2, atol=2e-2)


def test_a_real_model_with_its_tokenizer(stories260k: Path, tmp_path: Path, shared_dir: Path) -> None:
    config = RtnConfig(group_size=32, ignore=["re:.*mlp"], min_coverage=0.1)  # its mlp has 172 features
    quantize_folder(stories260k, tmp_path / "ours", config, progress=Progress())
    convert(tmp_path / "ours", tmp_path / "stories.gguf", "gguf")
    original = AutoTokenizer.from_pretrained(stories260k)
    written = AutoTokenizer.from_pretrained(tmp_path, gguf_file="stories.gguf")
    text = (shared_dir / "data/text/tinystories-valid.txt").read_text()[:4000]
    assert written(text).input_ids == original(text).input_ids
    ids = original("Once upon a time", return_tensors="pt").input_ids
    ours_ = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", device_map="cpu", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            read(tmp_path / "stories.gguf")(ids).logits, ours_(ids).logits, rtol=1e-3, atol=1e-3
        )


def test_scores_pick_merges_as_the_ranks_do(stories15m: Path) -> None:
    """llama.cpp merges the neighbours whose token has the highest score: the same ids as the tokenizer gives."""
    from woq.interop.gguf_tokenizer import _scores, _tokens

    raw = json.loads((stories15m / "tokenizer.json").read_text())
    tokens, _ = _tokens(raw, 32000)
    scores = dict(zip(tokens, _scores(tokens, raw["model"]), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(stories15m)
    for text in ("Once upon a time there was a little girl", "unbelievably, Lily's 3 cats ran!"):
        pieces = list("▁" + text.replace(" ", "▁"))
        while True:
            pairs = [(scores.get(a + b), -i) for i, (a, b) in enumerate(itertools.pairwise(pieces))]
            found = [pair for pair in pairs if pair[0] is not None]
            if not found:
                break
            at = -max(found)[1]  # type: ignore[type-var]
            pieces[at : at + 2] = ["".join(pieces[at : at + 2])]
        assert [tokens.index(piece) for piece in pieces] == tokenizer(
            text, add_special_tokens=False
        ).input_ids


def test_splittings() -> None:
    def named(*steps: dict[str, Any]) -> str:
        return splitting(
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}}, Path("tokenizer.json")
        )

    byte_level = {"type": "ByteLevel", "use_regex": False}
    for pattern, name in PATTERNS.items():
        assert named({"type": "Split", "pattern": {"Regex": pattern}}, byte_level) == name
    assert named({"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}) == "smollm"
    assert splitting({"pre_tokenizer": {"type": "ByteLevel", "use_regex": True}}, Path("x")) == "gpt-2"
    with pytest.raises(CheckpointError, match="has no name in llama"):
        named({"type": "Split", "pattern": {"Regex": "x"}}, byte_level)


def test_what_is_not_written(tmp_path: Path) -> None:
    make_folder(tmp_path / "source", lambda w: gptq(w, 0), config=SYM, sym=True)
    with pytest.raises(ConfigError, match="no name of a GGUF file"):
        convert(tmp_path / "source", tmp_path / "model", "gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="exists"):
        convert(tmp_path / "source", tmp_path / "x.gguf", "gguf")
    with pytest.raises(CheckpointError, match=r"x\.gguf cannot be read by transformers"):
        read(tmp_path / "x.gguf")
    config = json.loads((tmp_path / "source/config.json").read_text())
    (tmp_path / "source/config.json").write_text(
        json.dumps({**config, "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}})
    )
    with pytest.raises(CheckpointError, match="rope_type 'yarn' is not written"):
        convert(tmp_path / "source", tmp_path / "y.gguf", "gguf")
    assert not (tmp_path / "y.gguf").exists() and not list(tmp_path.glob("*.partial"))
