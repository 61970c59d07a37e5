"""The files of somebody else's folder: what describes it, and what holds its tensors.

Safetensors first; pickles (`.bin`, `.pt`, `.pth`) only where there are none, and then only tensors: torch's
`weights_only` unpickler runs no code. A name that leads out of the folder is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from woq.errors import CheckpointError
from woq.interop.base import Found
from woq.tensor_files import CONFIG, QUANTIZE_CONFIG, WEIGHTS, read_json, shards

IN_CONFIG = ("quantization_config", "compression_config")  # keys of config.json
DESCRIPTIONS = (QUANTIZE_CONFIG, "quant_config.json", "qconfig.json")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
# Files of a training run that hold no weights
_OTHERS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
# How some writers call a checkpoint that comes without any description
UNDESCRIBED = ("gptq_checkpoint_g*.pt", "qmodel.pt")


def find(folder: Path) -> Found | None:
    """What says that `folder` is quantized, or None for a float one. Raises CheckpointError where it is malformed."""
    config = read_json(folder / CONFIG)
    for key in IN_CONFIG:
        if key in config:
            if not isinstance(config[key], Mapping):
                raise CheckpointError(f"{folder / CONFIG}: {key} is {config[key]!r}, expected an object")
            return Found(folder, folder / CONFIG, config[key], weight_files(folder, config[key]))
    for name in DESCRIPTIONS:
        if (folder / name).exists():
            raw = read_json(folder / name)
            return Found(folder, folder / name, raw, weight_files(folder, raw))
    for pattern in UNDESCRIBED:
        files = tuple(sorted(folder.glob(pattern)))
        if files:
            return Found(folder, files[0], {}, files)
    return None


def weight_files(folder: Path, raw: Mapping[str, Any]) -> tuple[Path, ...]:
    """The files that hold the folder's tensors: by the usual names, by the basename its description gives, else
    whatever single set of weight files is there. Raises CheckpointError where several could be meant."""
    stems = [*_basenames(raw), "model", "pytorch_model"]
    for suffix in _SUFFIXES:
        for stem in stems:
            files = _set_of(folder, stem, suffix)
            if files:
                return files
        alone = [f for f in sorted(folder.glob(f"*{suffix}")) if not f.name.startswith(_OTHERS)]
        if len(alone) > 1 and suffix == ".safetensors" and not _is_shard_set(alone):
            raise CheckpointError(
                f"{folder} holds several weight files: {[f.name for f in alone]}",
                hint="name one in quantize_config.json as model_file_base_name, or remove the others",
            )
        if alone:
            return tuple(alone)
    return (folder / WEIGHTS,)  # whose absence is an error with a name


def _basenames(raw: Mapping[str, Any]) -> list[str]:
    """Names of weight files that AutoGPTQ and its kin gave: stated, or made of bits and group size."""
    stated = [raw.get(key) for key in ("model_file_base_name", "model_basename")]
    made = f"gptq_model-{raw.get('bits')}bit-{raw.get('group_size')}g"
    names = [name for name in (*stated, made) if isinstance(name, str)]
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"model_file_base_name {name!r} leads out of the folder")
    return names


def _set_of(folder: Path, stem: str, suffix: str) -> tuple[Path, ...]:
    index, single = folder / f"{stem}{suffix}.index.json", folder / f"{stem}{suffix}"
    if not index.exists():
        return (single,) if single.exists() else tuple(sorted(folder.glob(f"{stem}-*-of-*{suffix}")))
    return tuple(shards(index))


def _is_shard_set(files: list[Path]) -> bool:
    return all("-of-" in file.name for file in files)
