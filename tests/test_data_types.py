"""Every data type through the whole chain: quantize, save, reload, the same logits; and what old readers do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import TINY_ARCHITECTURES
from woq import AutoModelForCausalLM, RtnConfig, quantize
from woq.checkpoint import FolderFormat
from woq.errors import CheckpointError
from woq.inspection import inspect_folder
from woq.linear import QuantLinear
from woq.saving import save_pretrained
from woq.tensor_files import TensorFolder
from woq.weights import CODEBOOKS, DATA_TYPES

IDS = torch.arange(24).view(2, 12)
BASE: dict[str, Any] = {"group_size": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    **{name: {"weight_dtype": name} for name in CODEBOOKS},
    "nf4, scales as codes": {"weight_dtype": "nf4", "double_quant": True},
    "int4, scales as 6-bit codes": {
        "sym": False, "double_quant": True, "double_quant_bits": 6, "double_quant_group_size": 8
    },
    "fp4, plain layout": {"weight_dtype": "fp4", "compression_dtype": "int8", "scale_dtype": "fp32"},
    "hqq, float zeros": {"sym": False, "float_zeros": True, "search": "hqq"},
    "float zeros of searched ranges, in bfloat16": {"sym": False, "float_zeros": True, "scale_dtype": "bf16"},
    "hqq, whole zeros": {"sym": False, "search": "hqq"},
    "full range": {"full_range": True, "search": "minmax"},
    "nf4 and an 8-bit layer": {
        "weight_dtype": "nf4", "overrides": {r".*\.1\..*": {"weight_dtype": "int", "bits": 8}}
    },
}  # fmt: skip


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    result: Tensor = model(IDS).logits
    return result


def quantized(folder: Path, arch: str = "llama", **fields: Any) -> nn.Module:
    model = TINY_ARCHITECTURES[arch]()
    quantize(model, RtnConfig(**{**BASE, **fields}), device="cpu")
    save_pretrained(model, folder)
    return model


def raw_config(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return values


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_a_folder_reloads_to_the_same_logits(fields: dict[str, Any], tmp_path: Path) -> None:
    before = quantized(tmp_path / "model", **fields)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="cpu")
    assert torch.equal(logits(after), logits(before))
    float_logits = logits(TINY_ARCHITECTURES["llama"]())
    error = (logits(before) - float_logits).norm() / float_logits.norm()
    assert 0 < error < 0.5
    specs = {n: m.spec for n, m in after.named_modules() if isinstance(m, QuantLinear)}
    assert specs == {n: m.spec for n, m in before.named_modules() if isinstance(m, QuantLinear)}
    after.save_pretrained(tmp_path / "again")
    one, two = (TensorFolder(tmp_path / name) for name in ("model", "again"))
    assert one.index.keys() == two.index.keys()
    assert all(torch.equal(one.read(name), two.read(name)) for name in one.index)


@pytest.mark.parametrize("arch", ["gpt2", "mixtral"])
def test_other_architectures_take_codebooks_too(arch: str, tmp_path: Path) -> None:
    before = quantized(tmp_path / "model", arch, weight_dtype="nf4", double_quant=True)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="cpu")
    assert torch.equal(logits(after), logits(before))


def test_scales_as_codes_are_small_on_disk_and_used(tmp_path: Path) -> None:
    plain = quantized(tmp_path / "plain", weight_dtype="nf4", group_size=16)
    coded = quantized(tmp_path / "coded", weight_dtype="nf4", group_size=16, double_quant=True)
    sizes = []
    for name in ("plain", "coded"):
        index = TensorFolder(tmp_path / name).index
        sizes.append(sum(int(torch.tensor(i.shape).prod()) * (2 if i.dtype == "F16" else 4)
                         for n, i in index.items() if "scale" in n))  # fmt: skip
        assert any(n.endswith(".scales") for n in index) == (name == "plain")
    assert sizes[1] < 0.55 * sizes[0]  # 8 bits and a step and an offset for 256, of 16
    assert not torch.equal(logits(plain), logits(coded))


def test_what_old_readers_would_misread_has_a_version_they_refuse(tmp_path: Path) -> None:
    quantized(tmp_path / "old")
    quantized(tmp_path / "new", weight_dtype="nf4", double_quant=True)
    old, new = raw_config(tmp_path / "old"), raw_config(tmp_path / "new")
    assert (old["quant_method"], old["woq"]["version"]) == ("gptq", 1)
    assert "data_type" not in old["woq"] and "double_quant" not in old["woq"]
    assert (new["quant_method"], new["checkpoint_format"], new["woq"]["version"]) == ("woq", "woq_gptq", 2)
    assert new["woq"]["data_type"] == "nf4"
    assert new["woq"]["double_quant"] == {
        "bits": 8,
        "group_size": 256,
        "sym": False,
        "scale_dtype": "float16",
    }


BROKEN = {
    "unknown type": ({"data_type": "nf3"}, "data type 'nf3' with 4 bits is not known"),
    "forgotten type": ({"data_type": "int"}, r"\['qzeros'\] missing"),
    "no scales": ({"double_quant": None}, r"\['scales'\] missing"),
    "bits of scales": ({"double_quant": {"bits": 9, "group_size": 256, "sym": False, "scale_dtype": "float16"}},
                       "double_quant is malformed.*out of range"),
    "width of scales": ({"double_quant": {"bits": 6, "group_size": 256, "sym": False, "scale_dtype": "float16"}},
                        r"qscales is torch.int32"),
    "dtype of scales": ({"double_quant": {"bits": 8, "group_size": 256, "sym": False, "scale_dtype": "int8"}},
                        "double_quant is malformed"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BROKEN.values(), ids=BROKEN)
def test_metadata_that_contradicts_the_tensors_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    quantized(tmp_path / "m", weight_dtype="nf4", double_quant=True)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"]["woq"].update(changes)
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m", device_map="cpu")


def test_inspect_tells_the_data_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("woq.native.why_not", lambda name: f"no compiler for the {name} kernels")
    quantized(tmp_path / "m", weight_dtype="fp4_e2m1", double_quant=True)
    facts = inspect_folder(tmp_path / "m", device="cpu", dtype=torch.bfloat16)
    (kind,) = facts.kinds
    assert (kind.data_type, kind.scales, kind.backend) == ("fp4_e2m1", "float16 as 8-bit codes", "reference")
    assert "no compiler" in kind.refused["cpu"] and "not fp4_e2m1" in kind.refused["torch"]
    assert any("read by woq only" in oddity for oddity in facts.oddities)


def test_a_standard_folder_is_read_by_the_standard_alone(tmp_path: Path) -> None:
    """A key of ours in a GPTQ folder cannot make its codes mean something that other readers do not see."""
    quantized(tmp_path / "m")
    raw = raw_config(tmp_path / "m")
    raw["woq"]["data_type"] = "nf4"
    assert FolderFormat.parse(raw, tmp_path).settings("model.layers.0.mlp.up_proj")[3] == "int"


def test_every_data_type_is_one_a_config_makes() -> None:
    assert {*CODEBOOKS, "int", "int_float_zeros"} == set(DATA_TYPES)
