"""Writing a quantized folder so that a kill at any moment costs at most one block.

Blocks go one by one into `<folder>.partial`, each file whole or absent (written aside, synced, renamed). A manifest
there says what is being made; resuming with anything else is refused. `finish` adds the rest, gathers the blocks
into shards and renames the directory into place: the target folder appears complete or not at all.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from woq.errors import CheckpointError
from woq.tensor_files import CONFIG, QUANTIZE_CONFIG, WEIGHTS, WEIGHTS_INDEX, read_json

MANIFEST = "manifest.json"
SHARD_BYTES = 2 << 30
_OURS = ("*.safetensors", "*.safetensors.index.json", "quantization_*")  # stale once a folder is replaced


@contextmanager
def explaining(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into an error that says what is left and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        raise CheckpointError(
            f"cannot write {path}: {'the disk is full' if full else error}",
            hint="finished blocks are kept; make room and run again with resume" if full else None,
        ) from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write atomically."""
    with explaining(path):
        aside = path.with_name(f"{path.name}.tmp")
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        aside.replace(path)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file atomically. Tensors may share memory; they are saved apart."""
    with explaining(path):
        aside = path.with_name(f"{path.name}.tmp")
        try:
            aside.touch()
            mode = aside.stat().st_mode  # what the user's umask gives; safetensors would make it private
            save_file(_unshared(tensors), aside, metadata={"format": "pt", **(metadata or {})})
            aside.chmod(mode)
            with aside.open("rb") as handle:
                os.fsync(handle.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, none a view of another: what safetensors accepts."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu").contiguous()
        if value.untyped_storage().data_ptr() in seen:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        result[name] = value
    return result


class FolderWriter:
    """A quantized folder in the making."""

    def __init__(
        self, folder: Path, *, resume: bool = False, overwrite: bool = False, shard_bytes: int | None = None
    ) -> None:
        """shard_bytes: about the most in a file; None: SHARD_BYTES. Raises CheckpointError, before any work, where the folder exists and `overwrite` is not set, or where an
        unfinished run exists and `resume` is not set."""
        self.folder = folder
        self.partial = folder.with_name(f"{folder.name}.partial")
        self.shard_bytes = SHARD_BYTES if shard_bytes is None else shard_bytes
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"{folder} is a file", hint="pass the name of a folder")
        if folder.exists() and not overwrite and any(folder.iterdir()):
            raise CheckpointError(
                f"{folder} exists and is not empty", hint="pass overwrite to replace it when all is done"
            )
        if self.partial.exists() and not resume:
            raise CheckpointError(
                f"{self.partial} holds an unfinished run",
                hint="pass resume to go on with it, or remove that directory",
            )

    def begin(self, manifest: Mapping[str, Any]) -> None:
        """manifest: what this run makes (model, config, data), JSON values only.

        Raises CheckpointError where the unfinished run that is to be resumed was making something else.
        """
        found = self.partial / MANIFEST
        if found.exists():
            self._same_run(read_json(found), json.loads(json.dumps(manifest)))
        with explaining(self.partial):
            self.partial.mkdir(parents=True, exist_ok=True)
        write_json(found, manifest)

    def _same_run(self, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        differing = sorted(k for k in earlier.keys() | now.keys() if earlier.get(k) != now.get(k))
        if differing:
            told = "; ".join(f"{k}: then {earlier.get(k)!r}, now {now.get(k)!r}" for k in differing)
            raise CheckpointError(
                f"{self.partial} was begun differently ({told})",
                hint="use the same model, configuration and data, or remove it",
            )

    def _block_file(self, index: int) -> Path:
        return self.partial / f"block-{index:05d}.safetensors"

    def has_block(self, index: int) -> bool:
        """Whether block `index` is written."""
        return self._block_file(index).exists()

    def write_block(self, index: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Write block `index`: its tensors by full name, and what is to be told of it."""
        write_tensors(self._block_file(index), tensors, {"record": json.dumps(record)})

    def read_block(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `write_block` was given. Raises CheckpointError where the file is damaged."""
        file = self._block_file(index)
        try:
            with safe_open(file, framework="pt") as handle:
                record = json.loads(handle.metadata()["record"])
                return {name: handle.get_tensor(name) for name in handle.keys()}, record  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise CheckpointError(
                f"{file} is damaged: {error}", hint="remove this file and resume"
            ) from error

    def finish(
        self,
        rest: Mapping[str, Tensor],
        model_config: Mapping[str, Any],
        quantization: Mapping[str, Any],
        blocks: int,
        check: Callable[[Path], None] | None = None,
    ) -> None:
        """Write all else and put the folder in place.

        rest: tensors outside the blocks. model_config: the model's config.json. blocks: how many were written.
        check: given the whole folder before it is in place; what it raises leaves nothing behind.
        """
        self.write_block(blocks, rest, {})
        self._gather(blocks + 1)
        write_json(self.partial / CONFIG, {**model_config, "quantization_config": dict(quantization)})
        write_json(self.partial / QUANTIZE_CONFIG, quantization)
        with explaining(self.folder):
            (self.partial / MANIFEST).unlink()
        if check is not None:
            try:
                check(self.partial)
            except BaseException:
                shutil.rmtree(self.partial)
                raise
        with explaining(self.folder):
            self._swap_in()

    def _swap_in(self) -> None:
        if not self.folder.exists():
            self.partial.rename(self.folder)
            return
        old = self.folder.with_name(f"{self.folder.name}.replaced-{os.getpid()}")
        self.folder.rename(old)
        self.partial.rename(self.folder)
        for entry in old.iterdir():  # a tokenizer, notes: what no model folder of ours brings stays
            new = self.folder / entry.name
            if not new.exists() and not any(fnmatch(entry.name, pattern) for pattern in _OURS):
                entry.rename(new)
        shutil.rmtree(old)

    def _gather(self, files: int) -> None:
        """Merge block files, in order, into shards of at most about `shard_bytes`; read through the page cache."""
        shards: list[list[Path]] = []
        size = 0
        for file in map(self._block_file, range(files)):
            length = file.stat().st_size
            if not shards or size + length > self.shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(file)
            size += length
        weight_map, total = {}, 0
        for i, members in enumerate(shards):
            name = WEIGHTS if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            tensors: dict[str, Tensor] = {}
            for file in members:
                with safe_open(file, framework="pt") as handle:
                    tensors.update({key: handle.get_tensor(key) for key in handle.keys()})  # noqa: SIM118
            write_tensors(self.partial / name, tensors)
            weight_map.update(dict.fromkeys(tensors, name))
            total += sum(t.numel() * t.element_size() for t in tensors.values())
        if len(shards) > 1:
            write_json(
                self.partial / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
            )
        for file in map(self._block_file, range(files)):
            file.unlink()
