"""Rewriting a quantized folder in another format, without loss or not at all.

Layer by layer, in parts of about PART_BYTES, through the writer that quantization uses: memory stays near one part, a
kill leaves an unfinished run beside the target and nothing else. Whether every layer can be stored is asked before the
first is written. At the end some layers are read back through the target format's own reader and compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from woq.blocks import linears, weight_of
from woq.errors import CheckpointError, ConfigError, QuantizationError
from woq.head import output_head
from woq.interop import TARGETS, load
from woq.interop.base import Summary, Writer
from woq.interop.folder import QuantizedFolder
from woq.loading import model_config, skeleton, unfuse_like
from woq.saving import copy_small_files
from woq.tensor_files import CONFIG, read_json
from woq.weights import GPTQ_V2, QuantizedWeight, WeightSpec
from woq.writer import FolderWriter

PART_BYTES = 1 << 29
CHECKED_LAYERS = 8


@dataclass(frozen=True)
class Conversion:
    """What was done. checked: layers that were read back from the target and compared with the source."""

    source: str
    target: str
    read_as: str
    written_as: str
    layers: int
    checked: tuple[str, ...]


class Source(QuantizedFolder):
    """A quantized folder with what its model says: the sizes of its layers, and which linears are float."""

    def __init__(self, folder: Path, trust_remote_code: bool = False) -> None:
        """Raises CheckpointError as `QuantizedFolder`, and where a layer is no linear of the model."""
        super().__init__(folder)
        self.model_config = model_config(folder, trust_remote_code)
        if hasattr(self.model_config, "quantization_config"):
            del self.model_config.quantization_config
        self.model = skeleton(self.model_config, None, trust_remote_code)
        shapes = {name: weight_of(linear).shape for name, linear in linears(self.model).items()}
        self.naming = self.fit(self.model)
        unfuse_like(self.model, self)
        unknown = [name for name in self.layers if name not in shapes]
        if unknown:
            raise CheckpointError(
                f"{folder}: layer {unknown[0]!r} is no linear of {type(self.model).__name__}"
            )
        self.shapes = {name: (int(n), int(k)) for name, (n, k) in shapes.items()}

    def weight(self, name: str) -> QuantizedWeight:
        """Layer `name`, unpacked; scales that were stored as codes are what they decode to."""
        weight = self.packed(name, *self.shapes[name]).unpack()
        return replace(weight, spec=replace(weight.spec, double_quant=None), scale_codes=None)

    def written(self, name: str) -> dict[str, QuantizedWeight]:
        """Layer `name` under the names that other libraries know: what the model holds as one is several there."""
        weight, names = self.weight(name), self.naming.theirs(name)
        rows = weight.spec.out_features // len(names)
        return {other: rows_of(weight, i * rows, rows) for i, other in enumerate(names)}

    def summary(self, form: Writer, to: str) -> Summary:
        """Every layer's spec, after `form` was asked for each whether it can hold it. Reads all layers once.

        Raises CheckpointError naming the first layer that it cannot hold, and why.
        """
        specs = dict[str, WeightSpec]()
        for name in self.layers:
            for other, weight in self.written(name).items():
                reason = form.why_not(weight)
                if reason is not None:
                    raise CheckpointError(
                        f"layer {other!r} cannot be converted to {to} without loss: {reason}"
                    )
                specs[other] = weight.spec
        floats = (
            other for name in self.shapes if name not in self.layers for other in self.naming.theirs(name)
        )
        return Summary(specs, tuple(floats), self._head())

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of the files that are read, to know the same source again."""
        files = {info.file for info in self.tensors.index.values()}
        return {file.name: file.stat().st_size for file in sorted(files)}

    def _head(self) -> str | None:
        try:
            return output_head(self.model)[0]
        except QuantizationError:
            return None


def convert(
    folder: Path,
    target: Path,
    to: str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Conversion:
    """Write the quantized model in `folder` to `target` in the format `to`, a name of `woq.interop.TARGETS`.

    Raises ConfigError for an unknown format; CheckpointError where the source does not fit its model, where a layer
    cannot be stored without loss (naming the layer and the condition), where `target` exists and `overwrite` is not
    set, or where what was written reads back as something else.
    """
    if to not in TARGETS:
        raise ConfigError(f"no format {to!r} to convert to", hint=f"one of {', '.join(TARGETS)}")
    source, entry = Source(folder, trust_remote_code), TARGETS[to]
    if entry.exporter is not None:
        checked = load(entry.exporter)(source, target, overwrite=overwrite)
    else:
        checked = _write_folder(source, FolderWriter(target, resume=resume, overwrite=overwrite), to)
    return Conversion(str(folder), str(target), source.reader.format, to, len(source.layers), checked)


def _write_folder(source: Source, writer: FolderWriter, to: str) -> tuple[str, ...]:
    form: Writer = load(str(TARGETS[to].writer))()
    quantization = form.config(source.summary(form, to))
    writer.begin(
        {"convert": str(source.folder.resolve()), "sizes": source.sizes, "quantization_config": quantization}
    )
    parts = list(_parts(source))
    for i, (layers, floats) in enumerate(parts):
        if not writer.has_block(i):
            writer.write_block(i, _tensors(source, form, layers, floats), {})
    copy_small_files(source.folder, writer.partial)
    config = read_json(source.folder / CONFIG)
    for key in ("quantization_config", "compression_config"):
        config.pop(key, None)
    checked = sample(list(source.layers))
    writer.finish(
        {}, config, quantization, len(parts), check=lambda partial: compare(source, partial, checked)
    )
    return checked


def _parts(source: Source) -> Iterator[tuple[list[str], list[str]]]:
    """(layers, float tensors) of about PART_BYTES each, in the order of the source's files."""
    sizes: list[tuple[str, bool, int]] = [
        (name, True, sum(info.bytes for info in headers.values())) for name, headers in source.layers.items()
    ]
    sizes += [(name, False, info.bytes) for name, info in source.floats.items()]
    layers: list[str] = []
    floats: list[str] = []
    size = 0
    for name, quantized, length in sizes:
        if size and size + length > PART_BYTES:
            yield layers, floats
            layers, floats, size = [], [], 0
        (layers if quantized else floats).append(name)
        size += length
    yield layers, floats


def _tensors(source: Source, form: Writer, layers: list[str], floats: list[str]) -> Mapping[str, Tensor]:
    """What a part of the target holds, by full name."""
    tensors: dict[str, Tensor] = {}
    for name in floats:
        others = source.naming.their_tensor(name)
        tensors |= zip(others, source.read(name).chunk(len(others)), strict=True)
    for name in layers:
        pieces = source.written(name)
        for other, weight in pieces.items():
            tensors |= {f"{other}.{part}": tensor for part, tensor in form.tensors(weight).items()}
        expected = getattr(source.model.get_submodule(name), "bias", None) is not None
        bias = source.bias(name, source.shapes[name][0], expected)
        if bias is not None:
            chunks = bias.chunk(len(pieces))
            tensors |= {f"{other}.bias": chunk for other, chunk in zip(pieces, chunks, strict=True)}
    return tensors


def rows_of(weight: QuantizedWeight, start: int, count: int) -> QuantizedWeight:
    """`count` rows of a weight from row `start` on."""
    rows = slice(start, start + count)
    zeros = weight.zeros[rows]
    middle = 1 << (weight.spec.bits - 1)
    sym = weight.spec.sym or (weight.spec.data_type == "int" and bool((zeros == middle).all()))
    return replace(
        weight,
        spec=replace(weight.spec, out_features=count, sym=sym),
        codes=weight.codes[rows],
        scales=weight.scales[rows],
        zeros=zeros,
    )


# --- the check ---------------------------------------------------------------------------------------------------


def sample(layers: list[str]) -> tuple[str, ...]:
    """Some layers from the first to the last, evenly."""
    step = max(1, -(-len(layers) // CHECKED_LAYERS))
    return tuple(dict.fromkeys([*layers[::step], layers[-1]]))


def compare(source: Source, written: Path, layers: tuple[str, ...]) -> None:
    """Raises CheckpointError where a layer of the folder `written` is not bit for bit the source's."""
    target = QuantizedFolder(written)
    target.fit(source.model)
    for name in layers:
        ours = source.weight(name)
        theirs = target.packed(name, *source.shapes[name]).unpack()
        if not same(ours, theirs):
            raise CheckpointError(
                f"layer {name!r} of {written} reads back as something else",
                hint="report this with the output of `woq inspect` on the source",
            )


def same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    """Whether two weights have the same codes, scales, zero points and groups, bit for bit."""
    return (
        torch.equal(one.codes, other.codes)
        and torch.equal(one.scales.float(), other.scales.float())
        and torch.equal(one.zeros, other.zeros)
        and torch.equal(one.groups_of_inputs(), other.groups_of_inputs())
        and _plain(one.spec) == _plain(other.spec)
    )


def _plain(spec: WeightSpec) -> Any:
    """A spec without what belongs to storage, or is a claim."""
    return replace(spec, layout=GPTQ_V2, scale_dtype=torch.float32, sym=True)
