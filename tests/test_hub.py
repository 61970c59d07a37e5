"""What is downloaded from the hub, with a stub in its place: one folder, of which the patterns pick."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from tests.interop.folders import logits, make_folder
from tests.interop.foreign_writers import gptq, inc_optimum
from woq import AutoModelForCausalLM
from woq.errors import CheckpointError
from woq.loading import resolve_folder

LEGACY = {"bits": 4, "group_size": 32, "desc_act": False, "sym": False}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository "someone/model". Its cache is beside it."""
    repository, cache = tmp_path / "repository", tmp_path / "cache"
    repository.mkdir()

    def snapshot_download(name: str, *, allow_patterns: Sequence[str], **given: Any) -> str:
        assert (name, given) == ("someone/model", {"revision": "abc"})
        cache.mkdir(exist_ok=True)
        for file in repository.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, cache)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return repository


def downloaded() -> set[str]:
    return {file.name for file in resolve_folder("someone/model", {"revision": "abc"}).iterdir()}


def test_pickles_are_left_where_there_are_safetensors(hub: Path) -> None:
    (hub / "config.json").write_text(json.dumps({"quantization_config": LEGACY}))
    save_file({"x": torch.zeros(1)}, hub / "model.safetensors")
    for name in ("pytorch_model.bin", "tokenizer.json", "README.md"):
        (hub / name).write_text("{}")
    assert downloaded() == {"config.json", "model.safetensors", "tokenizer.json"}


def test_a_float_models_pickles_are_never_wanted(hub: Path) -> None:
    (hub / "config.json").write_text("{}")
    (hub / "pytorch_model.bin").write_text("")
    assert downloaded() == {"config.json"}


@pytest.mark.parametrize("described", ["config.json", "quantize_config.json"])
def test_a_quantized_folder_of_pickles(described: str, hub: Path) -> None:
    told: dict[str, Any] = (
        {"config": {**LEGACY, "quant_method": "gptq"}}
        if described == "config.json"
        else {"description": ("quantize_config.json", LEGACY)}
    )
    expected = make_folder(hub, lambda w: gptq(w, 1), file="gptq_model-4bit-32g.bin", **told)
    model = AutoModelForCausalLM.from_pretrained(
        "someone/model", revision="abc", device_map="cpu", dtype=torch.float32
    )
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)


def test_a_folder_that_only_its_files_name_tells_of(hub: Path) -> None:
    make_folder(hub, inc_optimum, file="gptq_checkpoint_g32.pt")
    (hub / "optimizer.pt").write_text("")
    assert downloaded() == {"config.json", "gptq_checkpoint_g32.pt"}


def test_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=r"neither a folder nor a hub repository.*no route"):
        resolve_folder("someone/model", {})
