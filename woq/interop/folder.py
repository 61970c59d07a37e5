"""A quantized folder, opened: its layers one by one as `PackedWeight`, whoever wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from woq.checkpoint import describe_specs
from woq.errors import CheckpointError
from woq.interop import find, reader_of
from woq.interop.base import Layer
from woq.interop.gptq import GptqReader, usual_settings
from woq.tensor_files import TensorFolder, TensorInfo
from woq.weights import PackedWeight, WeightSpec


class QuantizedFolder:
    """raw: the folder's own description. layers: the headers of every quantized layer's tensors, by its name."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError where the folder is float, of no known format, malformed, or damaged."""
        found = find(folder)
        if found is None:
            raise CheckpointError(f"{folder} has no quantization_config: it is a float checkpoint")
        self.folder = folder
        self.reader = reader_of(found)
        self.raw: Mapping[str, Any] = found.raw
        self.tensors = TensorFolder(folder, found.files)
        self.layers: dict[str, dict[str, TensorInfo]] = self.reader.layers(self.tensors.index)
        if not self.layers:
            raise CheckpointError(f"{found.where} describes a quantization, but no quantized layer is there")
        self.used = {_join(name, part) for name, parts in self.layers.items() for part in parts}

    def packed(self, name: str, out_features: int, in_features: int) -> PackedWeight:
        """Layer `name` of a model whose linear has these sizes. Raises CheckpointError with file, layer and tensor."""
        headers = self.layers[name]
        try:
            return self.reader.read(Layer(name, out_features, in_features, headers, self.tensors))
        except CheckpointError as error:
            file = headers[self.reader.marker].file
            raise CheckpointError(f"{file}: {error.message}", hint=error.hint) from error

    def bias(self, name: str, out_features: int, expected: bool) -> Tensor | None:
        """The layer's bias where the model has one.

        neural-compressor and IPEX store zeros where there was none: those are passed over. Raises CheckpointError.
        """
        headers = self.layers[name]
        if "bias" not in headers:
            if expected:
                raise CheckpointError(f"layer {name!r}: no bias stored, the model has one")
            return None
        bias = self.tensors.read(_join(name, "bias"))
        if bias.shape != (out_features,):
            raise CheckpointError(
                f"{headers['bias'].file}: layer {name!r}: bias is {list(bias.shape)}, expected [{out_features}]"
            )
        if not expected and bool(bias.any()):
            raise CheckpointError(f"layer {name!r}: a bias stored, the model has none")
        return bias if expected else None

    def description(self, specs: Mapping[str, WeightSpec]) -> dict[str, Any]:
        """The `quantization_config` of what was read here, as it would be saved: in our layout, whoever wrote it."""
        if isinstance(self.reader, GptqReader) and "woq" in self.raw:
            return dict(self.raw)
        return describe_specs(usual_settings(specs), specs, (), lm_head=False)

    @property
    def floats(self) -> dict[str, TensorInfo]:
        """The tensors that belong to no quantized layer."""
        return {name: info for name, info in self.tensors.index.items() if name not in self.used}


def _join(layer: str, part: str) -> str:
    return f"{layer}.{part}" if layer else part
