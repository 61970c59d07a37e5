"""GGUF: blocks against the gguf package's own dequantizer, whole files against transformers' reader."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.interop.folders import logits, make_folder
from tests.interop.foreign_writers import awq_gemm, gptq, random_plain
from tests.interop.test_layers import ours
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
