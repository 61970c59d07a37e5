"""transformers' own `from_pretrained`, `save_pretrained`, `push_to_hub` and `pipeline` on our folders."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import woq
from woq.errors import CheckpointError, ConfigError
from woq.interop.convert import convert
from woq.linear import QuantLinear

IDS = torch.arange(48).reshape(2, 24) % 120 + 3
CALIBRATION = [list(range(3 + i, 35 + i)) for i in range(8)]
RTN = {"group_size": 32, "device": "cpu"}
FOLDERS: dict[
    str, tuple[str, dict[str, Any], str]
] = {  # architecture, RTN settings, quant_method in the folder
    "standard gptq": ("llama", {"bits": 4}, "gptq"),
    "gptq_v2, 3 bits": ("llama", {"bits": 3, "sym": False}, "gptq"),
    "biases, Conv1D": ("gpt2", {"bits": 8}, "gptq"),
    "5 bits": ("qwen3", {"bits": 5}, "woq"),
    "plain layout": ("opt", {"bits": 4, "compression_dtype": "int8"}, "woq"),
    "experts": ("mixtral", {"bits": 4}, "woq"),
    "quantized head": ("llama", {"bits": 4, "quant_lm_head": True}, "gptq"),
}


def folder(tiny_model: Callable[[str], nn.Module], path: Path, arch: str, **settings: Any) -> torch.Tensor:
    """A quantized folder at `path`, and the logits of IDS."""
    model = tiny_model(arch)
    woq.quantize(model, woq.RtnConfig(**RTN, **settings))
    woq.save_pretrained(model, path)
    with torch.no_grad():
        return model(IDS).logits


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.to(model.device)).logits


@pytest.mark.parametrize("kind", FOLDERS)
def test_plain_transformers_loads_and_saves(
    kind: str, tiny_model: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    arch, settings, method = FOLDERS[kind]
    expected = folder(tiny_model, tmp_path / "ours", arch, **settings)
    assert (
        json.loads((tmp_path / "ours/config.json").read_text())["quantization_config"]["quant_method"]
        == method
    )
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values())
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) > 5
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "theirs")
    for door in (transformers.AutoModelForCausalLM, woq.AutoModelForCausalLM):
        again = door.from_pretrained(tmp_path / "theirs", device_map="cpu")
        torch.testing.assert_close(logits(again), expected, atol=1e-4, rtol=1e-4)


def test_saving_over_the_folder_it_was_loaded_from(
    tiny_model: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    """Packed tensors are memory-mapped; writing over the file they are mapped from must not eat them."""
    expected = folder(tiny_model, tmp_path, "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), expected, atol=1e-4, rtol=1e-4)


def strip(path: Path) -> None:
    """Take our own key out of the metadata: what a folder of another GPTQ writer looks like."""
    for name in ("config.json", "quantize_config.json"):
        found = json.loads((path / name).read_text())
        found.get("quantization_config", found).pop("woq")
        (path / name).write_text(json.dumps(found))


@pytest.mark.parametrize("options", [{}, {"quantization_config": woq.WoqConfig(backend="reference")}])
def test_a_gptq_folder_of_others(
    options: Any, tiny_model: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    expected = folder(tiny_model, tmp_path, "llama")
    strip(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


def test_an_awq_folder(tiny_model: Callable[[str], nn.Module], tmp_path: Path) -> None:
    expected = folder(tiny_model, tmp_path / "ours", "llama", sym=False)
    convert(tmp_path / "ours", tmp_path / "awq", "awq")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "awq")
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "again")  # in our layout
    again = woq.AutoModelForCausalLM.from_pretrained(tmp_path / "again", device_map="cpu")
    torch.testing.assert_close(logits(again), expected, atol=1e-4, rtol=1e-4)


def test_where_gptqmodel_is_installed_folders_of_others_stay_with_it(
    tiny_model: Callable[[str], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tiny_model, tmp_path, "llama")
    for probe in ("is_optimum_available", "is_gptqmodel_available"):
        monkeypatch.setattr(f"woq.compat.quantizer.{probe}", lambda: True)
    load = transformers.AutoModelForCausalLM.from_pretrained
    assert load(tmp_path).config.quantization_config.quant_method == "woq"  # ours: it carries our key
    with (
        pytest.warns(UserWarning, match="quantization_config"),  # asked for by name: as without us
        pytest.raises(ImportError, match="optimum"),
    ):
        load(tmp_path, quantization_config=transformers.GPTQConfig(bits=4))
    strip(tmp_path)
    with pytest.raises(ImportError, match="optimum"):
        load(tmp_path)
    assert (
        load(tmp_path, quantization_config=woq.WoqConfig()).config.quantization_config.quant_method == "woq"
    )


def test_a_float_model_is_quantized(tiny_model: Callable[[str], nn.Module], tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "float")
    settings = woq.GPTQConfig(bits=4, group_size=32, device="cpu", num_samples=8, seq_len=16)
    config = woq.WoqConfig(settings, calibration=CALIBRATION)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    assert model.quantization_report.plan.coverage == 1
    expected = logits(model)
    model.save_pretrained(tmp_path / "packed")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    torch.testing.assert_close(logits(again), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="quantized already"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", quantization_config=config)


def test_refusals(tiny_model: Callable[[str], nn.Module], tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "float")
    load = transformers.AutoModelForCausalLM.from_pretrained
    with pytest.raises(ConfigError, match="WoqConfig\\(\\) quantizes nothing"):
        load(tmp_path / "float", quantization_config=woq.WoqConfig())
    folder(tiny_model, tmp_path / "packed", "llama")
    with pytest.raises(ConfigError, match="runs on one device"):
        load(tmp_path / "packed", device_map={"model.embed_tokens": "cpu", "model.layers": "disk"})
    (tmp_path / "packed/model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="damaged"):
        load(tmp_path / "packed")


def test_dequantize(tiny_model: Callable[[str], nn.Module], tmp_path: Path) -> None:
    expected = folder(tiny_model, tmp_path, "gpt2")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    plain = model.dequantize()
    assert not any(isinstance(m, QuantLinear) for m in plain.modules())
    torch.testing.assert_close(logits(plain), expected, atol=1e-4, rtol=1e-4)


def test_float16_on_a_cpu_becomes_bfloat16(tiny_model: Callable[[str], nn.Module], tmp_path: Path) -> None:
    folder(tiny_model, tmp_path, "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16, device_map="cpu")
    assert model.dtype == torch.bfloat16


def test_pipeline(stories260k: Path, tmp_path: Path) -> None:
    config = woq.RtnConfig(bits=4, group_size=32, on_ragged_group="smaller", device="cpu")
    woq.quantize_folder(stories260k, tmp_path / "w4", config)
    write = transformers.pipeline("text-generation", model=str(tmp_path / "w4"), device="cpu")
    said = write("Once upon a time", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert said.startswith("Once upon a time") and len(said) > len("Once upon a time")
    assert any(isinstance(m, QuantLinear) for m in write.model.modules())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the hub: commits are folders."""
    target = tmp_path / "hub"

    def create_commit(repo_id: str, operations: list[Any], **_: Any) -> str:
        for operation in operations:
            file = target / repo_id / operation.path_in_repo
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(operation.path_or_fileobj, file)
        return repo_id

    api = SimpleNamespace(
        create_repo=lambda repo_id, **_: SimpleNamespace(repo_id=repo_id), create_commit=create_commit
    )
    card = SimpleNamespace(save=lambda path: Path(path).write_text("# a model"))
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: api)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: card)
    return target


@pytest.mark.parametrize("door", [transformers.AutoModelForCausalLM, woq.AutoModelForCausalLM])
def test_push_to_hub(door: Any, hub: Path, tiny_model: Callable[[str], nn.Module], tmp_path: Path) -> None:
    expected = folder(tiny_model, tmp_path / "w4", "llama")
    model = door.from_pretrained(tmp_path / "w4", device_map="cpu")
    model.push_to_hub("me/w4", max_shard_size="20KB")
    assert (hub / "me/w4/README.md").exists()
    assert len(list((hub / "me/w4").glob("model-*.safetensors"))) > 1
    torch.testing.assert_close(
        logits(door.from_pretrained(hub / "me/w4", device_map="cpu")), expected, atol=1e-4, rtol=1e-4
    )


def test_registration_waits_for_transformers() -> None:
    """In a fresh interpreter; the order of this one is whatever pytest made it."""
    code = "import woq, sys; assert 'transformers' not in sys.modules; import transformers.quantizers.auto as a; print(a.AUTO_QUANTIZER_MAPPING['woq'].__name__)"
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "WoqQuantizer"
