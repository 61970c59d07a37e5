"""Folders as other libraries leave them load and give the logits that their weights mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.interop import foreign_writers as foreign
from tests.interop.folders import Write, logits, make_folder
from woq import AutoModelForCausalLM, RtnConfig, quantize_folder, save_pretrained
from woq.errors import CheckpointError
from woq.inspection import inspect_folder
from woq.interop import READERS
from woq.progress import Progress

LEGACY = {
    "bits": 4,
    "group_size": 32,
    "damp_percent": 0.01,
    "desc_act": False,
    "true_sequential": True,
    "sym": False,
}
CT = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": False,
                "strategy": "group",
                "group_size": 32,
            },
        }
    },
    "ignore": ["lm_head"],
}

QCONFIG = {
    f"('model.layers.{i}.{name}', 'Linear')": {"rtn": {"dtype": "int", "bits": 4, "group_size": 32, "use_sym": False}}
    for i in range(2)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
}  # fmt: skip


def v1(plain: foreign.Plain) -> dict[str, Tensor]:
    return foreign.gptq(plain, 1)


def inc(plain: foreign.Plain) -> dict[str, Tensor]:
    """neural-compressor's habits: a bias of zeros, and a g_idx of zeros that means none."""
    rows, columns = plain.codes.shape
    return {
        **v1(plain),
        "g_idx": torch.zeros(columns, dtype=torch.int32),
        "bias": torch.zeros(rows, dtype=torch.float16),
    }


# name -> (the reader that must take it, writer, arguments of make_folder)
FOLDERS: dict[str, tuple[str, Write, dict[str, Any]]] = {
    "AutoGPTQ, safetensors by basename": (
        "gptq",
        v1,
        {"description": ("quantize_config.json", LEGACY), "file": "gptq_model-4bit-32g.safetensors"},
    ),
    "AutoGPTQ, pickle by basename": (
        "gptq",
        v1,
        {"description": ("quantize_config.json", LEGACY), "file": "gptq_model-4bit-32g.bin"},
    ),
    "AutoGPTQ, stated basename": (
        "gptq",
        v1,
        {
            "description": ("quantize_config.json", {**LEGACY, "model_file_base_name": "mine"}),
            "file": "mine.safetensors",
        },
    ),
    "GPTQ in config.json": ("gptq", v1, {"config": {**LEGACY, "quant_method": "gptq"}}),
    "GPTQ with zeros for bias and g_idx": ("gptq", inc, {"config": {**LEGACY, "quant_method": "gptq"}}),
    "AutoAWQ gemm": (
        "awq",
        foreign.awq_gemm,
        {"config": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}},
    ),
    "AutoAWQ gemv, quant_config.json": (
        "awq",
        foreign.awq_gemv,
        {"description": ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "version": "GEMV"})},
    ),
    "auto-round": (
        "auto-round",
        foreign.auto_round_words_minus_one,
        {"config": {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 32, "sym": False}},
    ),
    "neural-compressor, transformers-like": (
        "inc",
        foreign.inc_optimum,
        {"config": {"quant_method": "rtn", "bits": 4, "group_size": 32, "sym": False, "compute_dtype": "fp32"}},
    ),
    "neural-compressor, torch API": (
        "inc-torch",
        lambda w: foreign.inc_plain(w, 32, 1),
        {"description": ("qconfig.json", QCONFIG), "file": "quantized_weight.pt"},
    ),
    "IPEX": ("ipex", foreign.inc_optimum, {"file": "gptq_checkpoint_g32.pt"}),
    "compressed-tensors": ("compressed-tensors", foreign.compressed_tensors, {"config": CT}),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_loads_and_means_what_it_says(name: str, tmp_path: Path) -> None:
    reader, write, arguments = FOLDERS[name]
    expected = make_folder(tmp_path / "foreign", write, **arguments)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "foreign", device_map="cpu", dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)
    facts = inspect_folder(tmp_path / "foreign")
    assert facts.format == reader
    assert [(kind.layers, kind.bits, kind.group, kind.sym) for kind in facts.kinds] == [(14, 4, 32, False)]
    assert not [oddity for oddity in facts.oddities if "will not load" in oddity]


def test_every_reader_has_a_folder_here() -> None:
    """Or in test_codebooks.py."""
    elsewhere = {"bitsandbytes", "bitsandbytes-int8", "hqq", "torchao"}
    assert {reader for reader, _, _ in FOLDERS.values()} | elsewhere == READERS.keys()


def test_what_was_loaded_is_saved_in_our_format(tmp_path: Path) -> None:
    _, write, arguments = FOLDERS["AutoAWQ gemm"]
    expected = make_folder(tmp_path / "foreign", write, **arguments)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "foreign", device_map="cpu", dtype=torch.float32)
    save_pretrained(model, tmp_path / "ours")
    saved = json.loads((tmp_path / "ours/config.json").read_text())["quantization_config"]
    assert (saved["quant_method"], saved["checkpoint_format"]) == ("gptq", "gptq_v2")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", device_map="cpu", dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(expected), rtol=1e-4, atol=1e-4)


def test_a_quantized_folder_is_not_quantized_again(tmp_path: Path) -> None:
    _, write, arguments = FOLDERS["AutoGPTQ, safetensors by basename"]
    make_folder(tmp_path / "foreign", write, **arguments)
    with pytest.raises(CheckpointError, match="is quantized already"):
        quantize_folder(tmp_path / "foreign", tmp_path / "out", RtnConfig(), progress=Progress())


# --- malformed ---------------------------------------------------------------------------------------------------


def _edit(file: str, change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / file)

    return damage


def _describe(file: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(text) and None


def _config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= changes
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def _pickle_code(folder: Path) -> None:
    torch.save({"a.qweight": torch.zeros(1), "code": Path}, folder / "gptq_model-4bit-32g.bin")


Q = "model.layers.1.mlp.up_proj"
GPTQ_FILE = "gptq_model-4bit-32g"
MALFORMED: list[tuple[str, Callable[[Path], Any], str]] = [
    ("AutoGPTQ, safetensors by basename", _describe("quantize_config.json", "{"), "quantize_config.json is not valid JSON"),
    ("AutoGPTQ, safetensors by basename", _describe("quantize_config.json", "{}"), r"quantize_config.json: quant_method None is not known"),
    ("AutoGPTQ, safetensors by basename", lambda f: (f / f"{GPTQ_FILE}.safetensors").unlink(), "model.safetensors does not exist"),
    ("AutoGPTQ, safetensors by basename", _edit(f"{GPTQ_FILE}.safetensors", lambda t: t.pop(f"{Q}.qzeros")), rf"{GPTQ_FILE}\.safetensors: layer '{Q}': \['qzeros'\] missing"),
    ("AutoGPTQ, stated basename", _describe("quantize_config.json", json.dumps({**LEGACY, "model_file_base_name": "../mine"})), "leads out of the folder"),
    ("AutoGPTQ, pickle by basename", _pickle_code, rf"{GPTQ_FILE}\.bin holds more than tensors"),
    ("AutoGPTQ, pickle by basename", lambda f: (f / f"{GPTQ_FILE}.bin").write_bytes(b"PK\x03\x04 no zip"), rf"{GPTQ_FILE}\.bin is damaged"),
    ("AutoGPTQ, pickle by basename", lambda f: (f / f"{GPTQ_FILE}.bin").write_bytes(b""), rf"{GPTQ_FILE}\.bin is damaged"),
    ("AutoGPTQ, pickle by basename", lambda f: torch.save([1], f / f"{GPTQ_FILE}.bin"), r"holds a list, expected a state dict"),
    ("AutoAWQ gemm", _config(bits=8), "AWQ folders have 4 bits, this one says 8"),
    ("AutoAWQ gemm", _config(group_size="x"), r"group_size is 'x', expected an int"),
    ("AutoAWQ gemm", _config(version="exllama"), "AWQ version 'exllama' is not known"),
    ("AutoAWQ gemm", _config(group_size=16), r"model\.safetensors: layer '.*': qzeros is"),
    ("AutoAWQ gemm", _edit("model.safetensors", lambda t: t.pop(f"{Q}.scales")), rf"layer '{Q}': tensor 'scales' is missing"),
    ("AutoAWQ gemm", _edit("model.safetensors", lambda t: t.update({f"{Q}.bias": torch.ones(96)})), rf"layer '{Q}': a bias stored, the model has none"),
    ("AutoAWQ gemm", _edit("model.safetensors", lambda t: [t.pop(n) for n in list(t) if ".q" in n]), "no quantized layer is there"),
    ("auto-round", _config(packing_format="auto_round:fp8"), "packing_format 'auto_round:fp8' is not known"),
    ("auto-round", _config(extra_config={".*": {"bits": 5}}), r"bits 5, group_size 32: auto-round's layouts"),
    ("auto-round", _config(extra_config=[1]), r"extra_config is \[1\]"),
    ("neural-compressor, transformers-like", _config(bits=9), "bits 9, expected 2 to 8"),
    ("neural-compressor, transformers-like", _config(bits=8), r"qweight is \[12, 64\]: 12 words for 96 codes"),
    ("neural-compressor, torch API", _describe("qconfig.json", '{"a": {}}'), "'a' is no"),
    ("neural-compressor, torch API", _describe("qconfig.json", json.dumps(dict(list(QCONFIG.items())[:3]))), "says dtype None"),
    ("IPEX", lambda f: (f / "gptq_checkpoint_g32.pt").rename(f / "gptq_checkpoint_g64.pt"), "qzeros is"),
    ("IPEX", lambda f: torch.save({}, f / "gptq_checkpoint_g64.pt"), "several checkpoints"),
    ("IPEX", lambda f: torch.save({"a.qweight": torch.zeros(3, 3, dtype=torch.int32)}, f / "gptq_checkpoint_g32.pt"), "'a' is no linear"),
    ("compressed-tensors", _config(config_groups={}), "config_groups is {}"),
    ("compressed-tensors", _config(config_groups={"g": {"targets": ["Linear"]}}), r"config_groups\.g is malformed"),
    ("compressed-tensors", _config(format="nvfp4-pack-quantized"), "format is 'nvfp4-pack-quantized': not weight-only integers"),
    ("compressed-tensors", _config(config_groups={"g": {**CT["config_groups"]["group_0"], "targets": ["re:nothing"]}}), "no group of .* has it as a target"),  # type: ignore[index]
    ("compressed-tensors", _config(config_groups={"g": {**CT["config_groups"]["group_0"], "input_activations": {"num_bits": 8}}}), "input_activations is"),  # type: ignore[index]
    ("compressed-tensors", _edit("model.safetensors", lambda t: t.update({f"{Q}.weight_shape": torch.tensor([1, 2])})), rf"layer '{Q}': weight_shape is \[1, 2\]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "message"), MALFORMED)
def test_malformed_folders(name: str, damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    _, write, arguments = FOLDERS[name]
    make_folder(tmp_path, write, **arguments)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")


def test_two_weight_files_that_both_could_be_meant(tmp_path: Path) -> None:
    make_folder(tmp_path, v1, description=("quantize_config.json", LEGACY), file="one.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "two.safetensors")
    with pytest.raises(
        CheckpointError, match=r"several weight files: \['one.safetensors', 'two.safetensors'\]"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
