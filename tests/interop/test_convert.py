"""`woq convert`: every quantized folder to every format, bit for bit, or a refusal that names layer and condition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.interop.folders import logits, make_folder
from tests.interop.test_folders import FOLDERS
from woq import AutoModelForCausalLM, RtnConfig, quantize_folder
from woq.cli import app
from woq.errors import CheckpointError, ConfigError
from woq.interop import TARGETS
from woq.interop import convert as converting
from woq.interop.convert import Source, convert, same
from woq.progress import Progress

SAFETENSORS = [name for name, target in TARGETS.items() if target.writer is not None]


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32)


@pytest.fixture
def awq(tmp_path: Path) -> Path:
    _, write, arguments = FOLDERS["AutoAWQ gemm"]
    make_folder(tmp_path / "awq", write, **arguments)
    return tmp_path / "awq"


@pytest.mark.parametrize("to", SAFETENSORS)
def test_every_layer_survives(to: str, awq: Path, tmp_path: Path) -> None:
    done = convert(awq, tmp_path / "target", to)
    assert (done.layers, len(done.checked)) == (14, 8)
    source, target = Source(awq), Source(tmp_path / "target")
    assert all(same(source.weight(layer), target.weight(layer)) for layer in source.layers)
    assert source.floats.keys() == target.floats.keys()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("to", ["awq", "compressed-tensors"])
def test_our_own_folder_there_and_back(to: str, stories260k: Path, tmp_path: Path) -> None:
    """Its mlp has 172 features, which other libraries refuse: it stays float here. The head is quantized."""
    config = RtnConfig(group_size=32, ignore=["re:.*mlp"], quant_lm_head=True, min_coverage=0.1)
    quantize_folder(stories260k, tmp_path / "ours", config, progress=Progress())
    convert(tmp_path / "ours", tmp_path / "there", to)
    convert(tmp_path / "there", tmp_path / "back", "gptq")
    one, other = Source(tmp_path / "ours"), Source(tmp_path / "back")
    assert "lm_head" in one.layers and all(same(one.weight(n), other.weight(n)) for n in one.layers)
    assert (tmp_path / "there/tokenizer.json").read_bytes() == (stories260k / "tokenizer.json").read_bytes()
    assert torch.equal(logits_of(tmp_path / "ours"), logits_of(tmp_path / "back"))


def logits_of(folder: Path) -> torch.Tensor:
    return logits(load(folder))


def test_parts_do_not_change_the_result(awq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(awq, tmp_path / "whole", "gptq_v2")
    monkeypatch.setattr(converting, "PART_BYTES", 20_000)
    convert(awq, tmp_path / "parts", "gptq_v2")
    one, other = Source(tmp_path / "whole"), Source(tmp_path / "parts")
    assert one.tensors.index.keys() == other.tensors.index.keys()
    assert all(torch.equal(one.tensors.read(n), other.tensors.read(n)) for n in one.tensors.index)


def test_refusal_names_layer_and_condition_and_writes_nothing(stories260k: Path, tmp_path: Path) -> None:
    config = RtnConfig(group_size=32, on_ragged_group="smaller")
    quantize_folder(stories260k, tmp_path / "ours", config, progress=Progress())
    with pytest.raises(
        CheckpointError, match=r"layer '.*down_proj' cannot be converted to gptq .*172 is no mult"
    ):
        convert(tmp_path / "ours", tmp_path / "target", "gptq")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


def test_what_reads_back_wrong_is_not_put_in_place(
    awq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from woq.interop.gptq import GptqWriter

    right = GptqWriter.tensors

    def wrong(self: GptqWriter, weight: Any) -> Any:
        tensors = right(self, weight)
        return {**tensors, "qweight": tensors["qweight"] ^ 1}

    monkeypatch.setattr(GptqWriter, "tensors", wrong)
    with pytest.raises(CheckpointError, match="reads back as something else"):
        convert(awq, tmp_path / "target", "gptq_v2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["awq"]


def test_an_unfinished_run_is_resumed(awq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(awq, tmp_path / "unbroken", "gptq_v2")
    monkeypatch.setattr(converting, "PART_BYTES", 20_000)
    right = converting._tensors
    calls: list[Any] = []

    def dying(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return right(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(converting, "_tensors", dying)
        with pytest.raises(KeyboardInterrupt):
            convert(awq, tmp_path / "target", "gptq_v2")
    with pytest.raises(CheckpointError, match="unfinished run"):
        convert(awq, tmp_path / "target", "gptq_v2")
    convert(awq, tmp_path / "target", "gptq_v2", resume=True)
    assert torch.equal(logits_of(tmp_path / "target"), logits_of(tmp_path / "unbroken"))


def test_float_folders_and_unknown_formats(awq: Path, stories260k: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it is a float checkpoint"):
        convert(stories260k, tmp_path / "x", "gptq")
    with pytest.raises(ConfigError, match="no format 'exl2' to convert to"):
        convert(awq, tmp_path / "x", "exl2")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        convert(awq, awq, "gptq")


def test_the_command(awq: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["convert", str(awq), str(tmp_path / "target"), "--to", "compressed-tensors"]
    )
    assert done.exit_code == 0, done.stderr
    assert "8 layers, the same bit for bit" in " ".join(done.stdout.split())
    facts = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path / "target"), "--json"]).stdout)
    assert facts["format"] == "compressed-tensors"
    refused = CliRunner().invoke(app, ["convert", str(awq), str(tmp_path / "target"), "--to", "gptq"])
    assert refused.exit_code == 2 and "hint: " in refused.stderr
