"""A quantized folder, opened: its layers one by one as `PackedWeight`, whoever wrote it."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from woq.blocks import linears
from woq.checkpoint import describe_specs
from woq.errors import CheckpointError
from woq.interop import find, reader_of
from woq.interop.base import Layer
from woq.interop.gptq import GptqReader, usual_settings
from woq.interop.names import Naming, gathered
from woq.tensor_files import TensorFolder, TensorInfo
from woq.weights import PackedWeight, QuantizedWeight, WeightSpec


class QuantizedFolder:
    """raw: the folder's own description. layers: the headers of every quantized layer's tensors, by its name.

    Names are the folder's until `fit` is told the model; then they are the model's.
    """

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError where the folder is float, of no known format, malformed, or damaged."""
        found = find(folder)
        if found is None:
            raise CheckpointError(f"{folder} has no quantization_config: it is a float checkpoint")
        self.folder = folder
        self.reader = reader_of(found)
        self.raw: Mapping[str, Any] = found.raw
        self.tensors = TensorFolder(folder, found.files)
        self._headers: dict[str, dict[str, TensorInfo]] = self.reader.layers(self.tensors.index)
        if not self._headers:
            raise CheckpointError(f"{found.where} describes a quantization, but no quantized layer is there")
        self.layers: Mapping[str, Mapping[str, TensorInfo]] = dict(self._headers)
        self.used = {_join(name, part) for name, parts in self._headers.items() for part in parts}
        self.floats = {name: info for name, info in self.tensors.index.items() if name not in self.used}
        # What the model calls otherwise, or holds as one: its name -> the names here, stacked along out_features.
        self._layers_of: dict[str, tuple[str, ...]] = {}
        self._floats_of: dict[str, tuple[str, ...]] = {}

    def fit(self, model: Any) -> Naming:
        """Take on the names of `model`, a transformers model with or without weights, and return their rules.

        Raises CheckpointError where of several layers that the model holds as one some are missing.
        """
        naming = Naming(model)
        known = set(linears(model))
        tensors = model.state_dict().keys() | {f"{n}.{part}" for n in known for part in ("weight", "bias")}
        layers = gathered(
            (name, naming.ours(name) if name not in known else (name, 0)) for name in self._headers
        )
        for ours, stored in layers.items():
            if ours in known and len(stored) != len(naming.theirs(ours)) and stored != (ours,):
                raise CheckpointError(
                    f"{self.folder}: of layer {ours!r} only {list(stored)} is there, expected {list(naming.theirs(ours))}"
                )
        floats = gathered(
            (name, _place(name, naming, tensors)) for name in self.tensors.index if name not in self.used
        )
        self._layers_of = {ours: stored for ours, stored in layers.items() if stored != (ours,)}
        self._floats_of = {ours: stored for ours, stored in floats.items() if stored != (ours,)}
        self.layers = {ours: self._headers_of(stored) for ours, stored in layers.items()}
        self.floats = {ours: self._info(stored) for ours, stored in floats.items()}
        return naming

    def _headers_of(self, stored: tuple[str, ...]) -> Mapping[str, TensorInfo]:
        if len(stored) == 1:
            return self._headers[stored[0]]
        return {_join(name, part): info for name in stored for part, info in self._headers[name].items()}

    def _info(self, stored: tuple[str, ...]) -> TensorInfo:
        """A float tensor's header, or that of several stacked."""
        first, *others = (self.tensors.index[name] for name in stored)
        if not others:
            return first
        return replace(first, shape=(first.shape[0] + sum(i.shape[0] for i in others), *first.shape[1:]))

    def read(self, name: str) -> Tensor:
        """Float tensor `name` of the model."""
        parts = [self.tensors.read(stored) for stored in self._floats_of.get(name, (name,))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def packed(self, name: str, out_features: int, in_features: int) -> PackedWeight:
        """Layer `name` of a model whose linear has these sizes. Raises CheckpointError with file, layer and tensor."""
        stored = self._layers_of.get(name, (name,))
        rows = out_features // len(stored)
        parts = [self._packed(part, rows, in_features) for part in stored]
        return parts[0] if len(parts) == 1 else _stacked(name, parts)

    def _packed(self, name: str, out_features: int, in_features: int) -> PackedWeight:
        headers = self._headers[name]
        try:
            return self.reader.read(Layer(name, out_features, in_features, headers, self.tensors))
        except CheckpointError as error:
            file = headers[self.reader.marker].file
            raise CheckpointError(f"{file}: {error.message}", hint=error.hint) from error

    def bias(self, name: str, out_features: int, expected: bool) -> Tensor | None:
        """The layer's bias where the model has one.

        neural-compressor and IPEX store zeros where there was none: those are passed over. Raises CheckpointError.
        """
        stored = self._layers_of.get(name, (name,))
        parts = [self._bias(part, out_features // len(stored), expected) for part in stored]
        there = [part for part in parts if part is not None]
        return torch.cat(there) if there else None

    def _bias(self, name: str, out_features: int, expected: bool) -> Tensor | None:
        headers = self._headers[name]
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
        return describe_specs(
            usual_settings(specs), specs, (), lm_head=False, own_names=bool(self._layers_of)
        )


def _join(layer: str, part: str) -> str:
    return f"{layer}.{part}" if layer else part


def _place(name: str, naming: Naming, known: Set[str]) -> tuple[str, int]:
    """The model's tensor that a stored float tensor is part of; its own name where the model has none."""
    ours, place = (name, 0) if name in known else naming.our_tensor(name)
    return (ours, place) if ours in known else (name, 0)


def _stacked(name: str, parts: list[PackedWeight]) -> PackedWeight:
    """Layers that the model holds as one, the first on top. Raises CheckpointError where they are not of one kind."""
    weights = [part.unpack() for part in parts]
    specs = [weight.spec for weight in weights]
    for what in ("bits", "group_size", "data_type", "scale_dtype", "layout"):
        found = [getattr(spec, what) for spec in specs]
        if found.count(found[0]) != len(found):
            raise CheckpointError(
                f"layer {name!r}: the model holds several layers as one, and their {what} differs: {found}"
            )
    groups = [weight.groups_of_inputs() for weight in weights]
    if any(not torch.equal(other, groups[0]) for other in groups[1:]):
        raise CheckpointError(
            f"layer {name!r}: the model holds several layers as one, and their g_idx differs",
            hint="they have one input: quantize them in one activation order, or without any",
        )
    spec = replace(
        specs[0],
        out_features=sum(spec.out_features for spec in specs),
        sym=all(spec.sym for spec in specs),
        double_quant=None,
    )
    codes, scales, zeros = (
        torch.cat([getattr(weight, part) for weight in weights]) for part in ("codes", "scales", "zeros")
    )
    return QuantizedWeight(spec, codes, scales, zeros, g_idx=weights[0].g_idx).pack()
