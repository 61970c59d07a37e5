"""What a foreign format is here: a way to tell a folder, to read its layers, and maybe to write them.

A `Reader` turns the tensors of one layer into a `PackedWeight`; a `Writer` does the reverse. Both are thin: the
arithmetic of a format is a pair of pure functions in its file. Reading never guesses: a tensor of another shape or
dtype than the folder's description implies is an error that names file, layer and tensor. Writing loses nothing: a
weight that a format cannot hold exactly is refused, with the condition that it fails.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from woq.errors import CheckpointError
from woq.tensor_files import TensorFolder, TensorInfo
from woq.weights import GPTQ_V2, DataType, PackedWeight, QuantizedWeight, WeightSpec

HALVES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Found:
    """A folder before its format is known.

    raw: what describes the quantization, {} where only the file names tell. where: the file it stands in.
    files: the files that hold the tensors.
    """

    folder: Path
    where: Path
    raw: Mapping[str, Any]
    files: tuple[Path, ...]

    def integer(self, *names: str, default: int | None = None) -> int:
        """The first of `names` that the description has, as an int. Raises CheckpointError."""
        key = next((name for name in names if name in self.raw), names[0])
        value = self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise CheckpointError(f"{self.where}: quantization_config.{key} is {value!r}, expected an int")
        return value

    def one_of(self, name: str, allowed: Iterable[Any], default: Any = None) -> Any:
        """The value of `name`, which must be one of `allowed`. Raises CheckpointError."""
        value, known = self.raw.get(name, default), list(allowed)
        if value not in known:
            raise CheckpointError(f"{self.where}: {name} {value!r} is not known", hint=f"known: {known}")
        return value


@dataclass(frozen=True)
class Layer:
    """One quantized linear of a folder: the model's shape for it, and the headers of its tensors."""

    name: str
    out_features: int
    in_features: int
    headers: Mapping[str, TensorInfo]
    folder: TensorFolder

    def tensor(
        self, part: str, dtypes: torch.dtype | tuple[torch.dtype, ...], *shapes: tuple[int, ...]
    ) -> Tensor:
        """Tensor `part`, of one of `dtypes` and one of `shapes` (any, where none is given). Raises CheckpointError."""
        allowed = dtypes if isinstance(dtypes, tuple) else (dtypes,)
        if part not in self.headers:
            raise CheckpointError(
                f"layer {self.name!r}: tensor {part!r} is missing; found {sorted(self.headers)}"
            )
        got = self.folder.read(f"{self.name}.{part}" if self.name else part)
        if got.dtype not in allowed or (shapes and tuple(got.shape) not in shapes):
            dtype = " or ".join(map(str, allowed))
            due = " or ".join(str(list(shape)) for shape in shapes)
            raise CheckpointError(
                f"layer {self.name!r}: {part} is {got.dtype} {list(got.shape)}, expected {dtype} {due}".rstrip()
            )
        return got

    def groups(self, group_size: int) -> tuple[int, int]:
        """(group size resolved for this layer, number of groups). Raises CheckpointError for a size that cannot be."""
        if group_size != -1 and group_size <= 0:
            raise CheckpointError(f"layer {self.name!r}: group_size {group_size} is out of range")
        size = self.in_features if group_size == -1 else min(group_size, self.in_features)
        return size, -(-self.in_features // size)

    def multiple(self, of: int, side: str) -> None:
        """Raises CheckpointError where in_features or out_features is no multiple that the format needs."""
        value = self.in_features if side == "in_features" else self.out_features
        if value % of:
            raise CheckpointError(
                f"layer {self.name!r}: {side} {value} is no multiple of {of}, which the format needs"
            )

    def refuse(self, why: str, hint: str | None = None) -> CheckpointError:
        """An error about this layer, to be raised."""
        return CheckpointError(f"layer {self.name!r}: {why}", hint=hint)


class Reader(ABC):
    """The quantized layers of one folder. A layer is quantized exactly where `<name>.<marker>` exists.

    parts: every tensor that belongs to a layer, the bias aside; ignored: those that say nothing about the weight.
    """

    format: ClassVar[str]
    marker: ClassVar[str] = "qweight"
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")
    ignored: ClassVar[tuple[str, ...]] = ()

    def __init__(self, found: Found) -> None:
        """Raises CheckpointError where the description lacks what is needed, or says what no reader here knows."""
        self.found = found

    @classmethod
    @abstractmethod
    def detect(cls, found: Found) -> bool:
        """Whether the folder is of this format, told from its description and file names alone."""

    @abstractmethod
    def read(self, layer: Layer) -> PackedWeight:
        """The layer's weight, bit for bit. Raises CheckpointError where its tensors do not fit."""

    @abstractmethod
    def describe(self) -> str:
        """The layout in a line, for people."""

    @property
    def algorithm(self) -> str | None:
        """The algorithm that made the weights, where the folder says it in a way we know."""
        return None

    def layers(self, index: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
        """Every quantized layer by its full name, with the headers of its tensors (bias too)."""
        found = {}
        for name in index:
            if name == self.marker or name.endswith(f".{self.marker}"):
                layer = name.removesuffix(self.marker).removesuffix(".")
                prefix = f"{layer}." if layer else ""
                parts = (*self.parts, *self.ignored, "bias")
                found[layer] = {part: index[prefix + part] for part in parts if prefix + part in index}
        return found

    def oddities(self) -> list[str]:
        """What is unusual about the folder's description."""
        return []


@dataclass(frozen=True, eq=False)
class Parts:
    """A layer's numbers, wherever they stood: codes uint8 [N, K]; scales float [N, G]; zeros uint8 [N, G], float for
    float zero points, None for a codebook; g_idx int32 [K] where it says something (see `order_of`)."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    g_idx: Tensor | None = None


def pack(layer: Layer, parts: Parts, bits: int, group_size: int, data_type: DataType = "int") -> PackedWeight:
    """A layer as read from elsewhere, in our layout. `sym` is what the zero points say, whatever the folder claims."""
    zeros = parts.zeros
    for name, tensor in (("scales", parts.scales), ("zero points", zeros)):
        if tensor is not None and tensor.is_floating_point() and not tensor.isfinite().all():
            raise layer.refuse(f"{name} hold NaN or infinity", "the file is damaged: get it again")
    if zeros is None:
        zeros = torch.zeros(parts.scales.shape, dtype=torch.uint8)
    spec = WeightSpec(
        in_features=layer.in_features,
        out_features=layer.out_features,
        bits=bits,
        group_size=group_size,
        sym=parts.zeros is None or bool((zeros == 1 << (bits - 1)).all() and data_type == "int"),
        desc_act=parts.g_idx is not None,
        scale_dtype=parts.scales.dtype,
        layout=GPTQ_V2,
        data_type=data_type,
    )
    codes, scales = parts.codes.contiguous(), parts.scales.contiguous()
    return QuantizedWeight(spec, codes, scales, zeros.contiguous(), parts.g_idx).pack()


def order_of(layer: Layer, g_idx: Tensor, group_size: int) -> Tensor | None:
    """`g_idx` where it says more than k // group_size; None where it says that, or is all zeros (a writer's "none").

    Raises CheckpointError where it names groups that are not there, or groups of unequal sizes.
    """
    trivial = (torch.arange(layer.in_features) // group_size).to(torch.int32)
    if torch.equal(g_idx, trivial) or not g_idx.any():
        return None
    groups = int(trivial[-1]) + 1
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise layer.refuse(f"g_idx names groups {int(g_idx.min())} to {int(g_idx.max())} of {groups}")
    if not torch.equal(g_idx.bincount(minlength=groups), trivial.bincount()):
        raise layer.refuse(f"g_idx gives groups other sizes than {group_size} features")
    return g_idx


# --- writing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """What a writer must know of the whole folder to describe it.

    specs: of every quantized layer, by name. floats: linears left in float, in the model's order.
    """

    specs: Mapping[str, WeightSpec]
    floats: tuple[str, ...] = field(default=())
    head: str | None = None


class Writer(ABC):
    """How a format stores what we have. Without loss, or not at all."""

    @abstractmethod
    def why_not(self, weight: QuantizedWeight) -> str | None:
        """None where the format holds this very weight without loss, else the condition that it fails."""

    @abstractmethod
    def tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The layer's tensors by their names below the layer's; asked only where `why_not` has no objection."""

    @abstractmethod
    def config(self, summary: Summary) -> dict[str, Any]:
        """The `quantization_config` of the folder. Raises CheckpointError where it cannot describe all layers."""


def first_refusal(*conditions: tuple[bool, str]) -> str | None:
    """The reason beside the first condition that does not hold."""
    return next((reason for holds, reason in conditions if not holds), None)
