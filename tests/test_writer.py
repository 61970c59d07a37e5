"""A folder appears whole or not at all; nothing of the user's is lost; what is unfinished is never mistaken."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from woq.errors import CheckpointError
from woq.writer import FolderWriter, write_json, write_tensors

REST = {"embedding.weight": torch.arange(6.0).view(2, 3)}
MANIFEST = {"config": {"bits": 4}, "data": "none"}


def block(i: int) -> dict[str, Tensor]:
    return {
        f"layers.{i}.qweight": torch.full((4, 4), i, dtype=torch.int32),
        f"layers.{i}.scales": torch.ones(4).half(),
    }


def begun(folder: Path, blocks: int = 2, **options: Any) -> FolderWriter:
    writer = FolderWriter(folder, **options)
    writer.begin(MANIFEST)
    for i in range(blocks):
        writer.write_block(i, block(i), {"layers": [i]})
    return writer


def finish(writer: FolderWriter, blocks: int = 2) -> None:
    writer.finish(REST, {"model_type": "x"}, {"bits": 4}, blocks)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_whole_folder(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "q"
    finish(begun(target))
    assert names(target) == ["config.json", "model.safetensors", "quantize_config.json"]
    assert names(target.parent) == ["q"]
    got = load_file(target / "model.safetensors")
    expected = {**block(0), **block(1), **REST}
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], t) and got[name].dtype == t.dtype for name, t in expected.items())
    assert json.loads((target / "config.json").read_text()) == {
        "model_type": "x",
        "quantization_config": {"bits": 4},
    }


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("woq.writer.SHARD_BYTES", 300)
    finish(begun(tmp_path / "q", 5), 5)
    index = json.loads((tmp_path / "q" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "q" / file)
    assert index["metadata"]["total_size"] == 5 * (64 + 8) + 24


def test_blocks_come_back(tmp_path: Path) -> None:
    writer = begun(tmp_path / "q")
    assert [writer.has_block(i) for i in range(3)] == [True, True, False]
    tensors, record = writer.read_block(1)
    assert record == {"layers": [1]}
    assert torch.equal(tensors["layers.1.qweight"], block(1)["layers.1.qweight"])


def test_damaged_block_is_named(tmp_path: Path) -> None:
    writer = begun(tmp_path / "q")
    file = writer.partial / "block-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(
        CheckpointError, match=r"block-00001\.safetensors is damaged.*\n.*remove this file and resume"
    ):
        writer.read_block(1)


def test_unfinished_run_wants_resume(tmp_path: Path) -> None:
    begun(tmp_path / "q", 1)
    with pytest.raises(CheckpointError, match=r"q\.partial holds an unfinished run\n.*resume"):
        FolderWriter(tmp_path / "q")
    writer = FolderWriter(tmp_path / "q", resume=True)
    with pytest.raises(CheckpointError, match=r"begun differently \(data: then 'none', now 'other'\)"):
        writer.begin({**MANIFEST, "data": "other"})
    writer.begin(MANIFEST)
    assert writer.has_block(0)
    assert not writer.has_block(1)


def test_existing_target_is_not_touched(tmp_path: Path) -> None:
    target = tmp_path / "q"
    target.mkdir()
    FolderWriter(target)  # an empty folder is no obstacle
    (target / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"q exists and is not empty\n.*overwrite"):
        FolderWriter(target)
    (tmp_path / "file").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="file is a file"):
            FolderWriter(tmp_path / "file", overwrite=overwrite)
    assert (target / "notes.txt").read_text() == "mine"


def test_overwriting_replaces_the_model_and_nothing_else(tmp_path: Path) -> None:
    target, unrelated = tmp_path / "q", tmp_path / "q.old"
    target.mkdir()
    unrelated.mkdir()
    (unrelated / "backup").write_text("mine")
    for name in (
        "notes.txt",
        "tokenizer.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
    ):
        (target / name).write_text("old")
    (target / "config.json").write_text("old")
    writer = begun(target, overwrite=True)
    assert (target / "config.json").read_text() == "old"  # until all is done
    finish(writer)
    assert names(target) == [
        "config.json",
        "model.safetensors",
        "notes.txt",
        "quantize_config.json",
        "tokenizer.json",
    ]
    assert "model_type" in (target / "config.json").read_text()
    assert names(tmp_path) == ["q", "q.old"]
    assert (unrelated / "backup").read_text() == "mine"


# --- a full disk -------------------------------------------------------------------------------------------------


def full(*args: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("function", ["save_file", "os.fsync"])
def test_full_disk(function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = begun(tmp_path / "q", 1)
    with monkeypatch.context() as patch:
        patch.setattr(f"woq.writer.{function}", full)
        with pytest.raises(CheckpointError, match=r"block-00001\.safetensors: the disk is full\n.*resume"):
            writer.write_block(1, block(1), {})
    assert names(writer.partial) == ["block-00000.safetensors", "manifest.json"]
    assert not (tmp_path / "q").exists()
    writer.write_block(1, block(1), {})
    finish(writer)
    assert load_file(tmp_path / "q" / "model.safetensors").keys() == {**block(0), **block(1), **REST}.keys()


def test_full_disk_at_the_very_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While shards are gathered: the blocks are still there."""
    writer = begun(tmp_path / "q")
    real = write_tensors

    def once_full(path: Path, *args: Any) -> None:
        if path.name.startswith("model"):
            raise CheckpointError("the disk is full")
        real(path, *args)

    monkeypatch.setattr("woq.writer.write_tensors", once_full)
    with pytest.raises(CheckpointError, match="full"):
        finish(writer)
    monkeypatch.undo()
    assert not (tmp_path / "q").exists()
    again = FolderWriter(tmp_path / "q", resume=True)
    again.begin(MANIFEST)
    assert again.has_block(0)
    assert again.has_block(1)
    finish(again)
    assert names(tmp_path) == ["q"]


def test_a_really_full_disk(tmp_path: Path) -> None:
    """In a user namespace, on a tmpfs of 1 MiB, where the kernel allows one."""
    code = (
        "import sys, torch; from pathlib import Path; from woq.writer import write_tensors; "
        "from woq.errors import CheckpointError\n"
        "target = Path(sys.argv[1]) / 'x.safetensors'\n"
        "try: write_tensors(target, {'a': torch.zeros(1 << 20)})\n"
        "except CheckpointError as error: print(error.message, sorted(p.name for p in target.parent.iterdir()))"
    )
    script = f'mount -t tmpfs -o size=1m none "{tmp_path}" && exec "{sys.executable}" -c "$0" "{tmp_path}"'
    try:
        done = subprocess.run(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, code],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("no unshare(1) here")
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"no tmpfs without privileges here: {done.stderr.strip()}")
    assert done.stdout.strip() == f"cannot write {tmp_path / 'x.safetensors'}: the disk is full []", (
        done.stderr
    )


# --- single files ------------------------------------------------------------------------------------------------


def test_tensors_that_share_memory_are_saved_apart(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    write_tensors(tmp_path / "x", {"whole": whole, "row": whole[1], "turned": whole.t()})
    got = load_file(tmp_path / "x")
    assert torch.equal(got["row"], whole[1])
    assert torch.equal(got["turned"], whole.t())


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tensors(tmp_path / "x", REST)
    write_json(tmp_path / "y.json", {"a": 1})
    monkeypatch.setattr("woq.writer.save_file", full)
    monkeypatch.setattr(Path, "replace", full)
    for call in (
        lambda: write_tensors(tmp_path / "x", block(0)),
        lambda: write_json(tmp_path / "y.json", {"a": 2}),
    ):
        with pytest.raises(CheckpointError, match="full"):
            call()
    assert load_file(tmp_path / "x").keys() == REST.keys()
    assert json.loads((tmp_path / "y.json").read_text()) == {"a": 1}


def test_files_are_readable_as_the_umask_says(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", REST)
    (tmp_path / "plain").touch()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode
