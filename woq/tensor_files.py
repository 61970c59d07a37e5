"""The files of a checkpoint: JSON, and tensors looked up by name before any is read.

Safetensors are memory-mapped; nothing is unpickled but what `pickled.py` can read without running code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from woq.errors import CheckpointError
from woq.pickled import Pickled
from woq.weights import TENSORS, PackedWeight, WeightSpec

CONFIG, QUANTIZE_CONFIG = "config.json", "quantize_config.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"

_DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8, "F64": 8,
}  # fmt: skip

# safetensors' names of the dtypes that scales and everything unquantized may have
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's file, safetensors dtype name and shape, read from a header."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of the tensor's data."""
        return math.prod(self.shape) * _DTYPE_BYTES.get(self.dtype, 1)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises CheckpointError where it is missing or no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def shards(index: Path) -> list[Path]:
    """The files that an index names. Raises CheckpointError where it is malformed or leads out of its folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map is missing or malformed")
    names = sorted(set(weight_map.values()))
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index}: weight_map names a file outside the folder")
    return [index.parent / name for name in names]


class TensorFolder:
    """The tensors of a folder's files: headers at once, data memory-mapped when asked for."""

    def __init__(self, folder: Path, files: Sequence[Path] | None = None) -> None:
        """files: safetensors, or pickled state dicts; None: those of a transformers folder.

        Raises CheckpointError where a file is missing, truncated, or contradicts the index.
        """
        self.folder = folder
        self.index: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._open: dict[Path, Any] = {}
        for file in self._files() if files is None else files:
            handle = self._handle(file)
            self.metadata |= handle.metadata() or {}
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                view = handle.get_slice(name)
                self.index[name] = TensorInfo(file, view.get_dtype(), tuple(view.get_shape()))

    def _files(self) -> list[Path]:
        index = self.folder / WEIGHTS_INDEX
        return shards(index) if index.exists() else [self.folder / WEIGHTS]

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            if not file.exists():
                raise CheckpointError(f"{file} does not exist", hint="is the download complete?")
            try:
                opened = safe_open(file, framework="pt") if file.suffix == ".safetensors" else Pickled(file)
                self._open[file] = opened
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file} is damaged: {error}", hint="truncated? copy or quantize it again"
                ) from error
        return self._open[file]

    def read(self, name: str) -> Tensor:
        """Tensor `name`, memory-mapped on the CPU."""
        tensor: Tensor = self._handle(self.index[name].file).get_tensor(name)
        return tensor

    def layers(self) -> Iterator[tuple[str, dict[str, TensorInfo]]]:
        """Every quantized layer by its full name, with the headers of its tensors (bias too)."""
        for name in self.index:
            if name.endswith(".qweight") or name == "qweight":
                layer = name.removesuffix("qweight").removesuffix(".")
                prefix = f"{layer}." if layer else ""
                yield (
                    layer,
                    {
                        part: self.index[prefix + part]
                        for part in (*TENSORS, "bias")
                        if prefix + part in self.index
                    },
                )

    def packed(self, name: str, spec: WeightSpec, headers: Mapping[str, TensorInfo]) -> PackedWeight:
        """Layer `name` as `spec` says, with a `g_idx` that says anything turned into `desc_act`.

        All zeros with several groups means that the writer had none (neural-compressor); k // group_size means the
        same. Raises CheckpointError where shapes or dtypes do not fit.
        """
        tensors = {part: self.read(f"{name}.{part}" if name else part) for part in headers if part != "bias"}
        trivial = (torch.arange(spec.in_features) // spec.group_size).to(torch.int32)
        g_idx = tensors.get("g_idx")
        if g_idx is None or (g_idx.shape == trivial.shape and not g_idx.any()):
            g_idx = tensors["g_idx"] = trivial
        if g_idx.shape != trivial.shape or g_idx.dtype != trivial.dtype:
            raise CheckpointError(
                f"layer {name!r}: g_idx is {g_idx.dtype} {list(g_idx.shape)}, expected torch.int32 [{spec.in_features}]"
            )
        if not torch.equal(g_idx, trivial):
            if g_idx.min() < 0 or g_idx.max() >= spec.groups:
                raise CheckpointError(
                    f"layer {name!r}: g_idx names groups {int(g_idx.min())} to {int(g_idx.max())} of {spec.groups}"
                )
            if not torch.equal(g_idx.bincount(minlength=spec.groups), trivial.bincount()):
                raise CheckpointError(  # kernels sort the columns by group and count on whole groups
                    f"layer {name!r}: g_idx gives groups other sizes than {spec.group_size} features"
                )
            spec = replace(spec, desc_act=True)
        packed = PackedWeight.from_tensors(spec, tensors, name)
        for part, tensor in packed.tensors().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise CheckpointError(
                    f"layer {name!r}: {part} hold NaN or infinity", hint="quantize it again"
                )
        return packed
