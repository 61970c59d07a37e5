"""A pickled state dict with the face of safetensors' `safe_open`: what older checkpoints are.

Only data: torch's `weights_only` unpickler runs no code, and refuses a file that holds any. Memory-mapped where the
file allows it.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from woq.errors import CheckpointError

# safetensors' names
_NAMES = {
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
    torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Pickled:
    """A pickled state dict with the face of safetensors' `safe_open`."""

    def __init__(self, file: Path) -> None:
        """Raises CheckpointError where it is damaged or holds anything but data."""
        try:
            state = self._load(file)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{file} holds more than tensors, or is damaged: {first_line(error)}",
                hint="convert it to safetensors where you trust it",
            ) from error
        except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{file} is damaged: {first_line(error)}") from error
        if not isinstance(state, Mapping):
            raise CheckpointError(f"{file} holds a {type(state).__name__}, expected a state dict")
        self._tensors = dict(_flat(state.get("state_dict", state)))

    @staticmethod
    def _load(file: Path) -> Any:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(file, map_location="cpu", weights_only=True)  # the format before torch 1.6

    def metadata(self) -> dict[str, str]:
        """Safetensors' free text, which pickles have none of."""
        return {}

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        """Tensor `name`."""
        return self._tensors[name]

    def get_slice(self, name: str) -> _Header:
        """Its dtype and shape."""
        return _Header(self._tensors[name])


def _flat(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors by dotted name, and what else describes them as tensors: numbers, sizes, and text as bytes."""
    for name, value in state.items():
        full = f"{prefix}{name}"
        if isinstance(value, Tensor):
            yield full, value
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{full}.")
        elif isinstance(value, str):
            yield full, torch.tensor(list(value.encode("latin-1", "replace")), dtype=torch.uint8)
        elif isinstance(value, bool | int) or (isinstance(value, torch.Size) and len(value)):
            yield full, torch.tensor(value, dtype=torch.int64)


def first_line(error: Exception) -> str:
    """What an exception says, without the advice that follows."""
    return next(iter(str(error).splitlines()), type(error).__name__)


class _Header:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_dtype(self) -> str:
        return _NAMES.get(self._tensor.dtype, str(self._tensor.dtype))

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)
