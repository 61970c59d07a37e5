"""What is in a checkpoint folder, quantized or float, told from headers, metadata and the model's shapes.

The model is built without weights to learn its linears' shapes; of the tensors only scales and g_idx are read, which
say what no header does. Whatever is unusual about a folder, so that another library may refuse or misread it, is
listed as an oddity.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from woq.backends import choose, refusals
from woq.backends.base import Target
from woq.blocks import find_blocks, linears, weight_of
from woq.checkpoint import GPTQ_BITS
from woq.console import human
from woq.errors import CheckpointError
from woq.interop import find
from woq.interop.folder import QuantizedFolder
from woq.loading import is_gguf, model_config, skeleton
from woq.modeling import run_device, run_dtype
from woq.tensor_files import TensorFolder, TensorInfo
from woq.weights import PackedWeight, WeightSpec

_OTHERS_BLOCK = 32  # other readers of GPTQ folders want both sides of a matrix to be multiples of this


@dataclass
class Kind:
    """Quantized layers that are alike. group: features that share a scale, or "channel". scales: their dtype, and how
    they are stored where that is not it. bytes: of all their tensors but the bias. refused: the backends made for this device that will not run them, with their reasons."""

    bits: int
    data_type: str
    group: int | str
    sym: bool
    desc_act: bool
    scales: str
    backend: str
    refused: dict[str, str]
    layers: int = 0
    weights: int = 0
    bytes: int = 0


@dataclass
class Facts:
    """A folder. bytes: of all tensors. format: the name of the reader in `woq.interop.READERS`. floats: what is not quantized, tensors of a kind by pattern -> description."""

    folder: str
    architecture: str
    runs_on: str
    bytes: int
    parameters: int
    format: str | None = None
    quant_method: str | None = None
    algorithm: str | None = None
    checkpoint_format: str | None = None
    layout: str | None = None
    kinds: list[Kind] = field(default_factory=list)
    floats: dict[str, str] = field(default_factory=dict)
    oddities: list[str] = field(default_factory=list)

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized layers, scales, zero points and g_idx included; NaN where there are none."""
        weights = sum(kind.weights for kind in self.kinds)
        return 8 * sum(kind.bytes for kind in self.kinds) / weights if weights else math.nan

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        bits = self.bits_per_weight
        return {**asdict(self), "bits_per_weight": None if math.isnan(bits) else round(bits, 4)}


def inspect_folder(
    folder: Path, *, dtype: torch.dtype | str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> Facts:
    """Look into a local folder, or a GGUF file. dtype and device: where it would run, for the choice of backends.

    Raises CheckpointError where files are missing, damaged, or do not fit the model.
    """
    if is_gguf(folder):
        return _inspect_gguf(folder)
    source = None if find(folder) is None else QuantizedFolder(folder)
    config = model_config(folder, trust_remote_code)
    where = run_device(device)
    target = Target(where, run_dtype(dtype, config.dtype, where))
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers would look for its own quantizer
    model = skeleton(config, None, trust_remote_code)
    tensors = TensorFolder(folder) if source is None else source.tensors
    facts = Facts(
        folder=str(folder),
        architecture=type(model).__name__,
        runs_on=f"{target.device} in {str(target.dtype).removeprefix('torch.')}",
        bytes=sum(info.bytes for info in tensors.index.values()),
        parameters=sum(p.numel() for p in model.parameters()),
    )
    if source is None:
        facts.oddities = _float_oddities(model)
        facts.floats = _floats(tensors.index)
    else:
        source.fit(model)
        _add_quantized(facts, model, source, target)
        facts.floats = _floats(source.floats)
    return facts


def _inspect_gguf(file: Path) -> Facts:
    """A GGUF file by its header. Raises CheckpointError where it has none."""
    try:
        from gguf import GGUFReader

        reader = GGUFReader(file)
    except (ImportError, ValueError, IndexError, OSError) as error:
        raise CheckpointError(
            f"{file} cannot be read: {error}", hint="is it whole? is gguf installed?"
        ) from error
    kinds: dict[str, list[Any]] = {}
    for tensor in reader.tensors:
        kinds.setdefault(tensor.tensor_type.name, []).append(tensor)
    field = reader.fields.get("general.architecture")
    return Facts(
        folder=str(file),
        architecture=str(field.contents()) if field else "not stated",
        runs_on="transformers, dequantized",
        bytes=sum(int(tensor.n_bytes) for tensor in reader.tensors),
        parameters=sum(int(tensor.n_elements) for tensor in reader.tensors),
        format="gguf",
        quant_method="gguf",
        checkpoint_format="gguf",
        layout=", ".join(f"{len(tensors)} x {kind}" for kind, tensors in kinds.items()),
        floats={
            f"blocks {kind}": f"{len(tensors)} tensors, {human(sum(int(t.n_bytes) for t in tensors))}"
            for kind, tensors in kinds.items()
        },
        oddities=["a GGUF file is loaded through transformers and runs in float"],
    )


def _add_quantized(facts: Facts, model: Any, source: QuantizedFolder, target: Target) -> None:
    """Fill in what is quantized."""
    reader = source.reader
    facts.format = reader.format
    facts.quant_method = str(source.raw.get("quant_method", f"not stated, read as {reader.format}"))
    facts.algorithm = reader.algorithm
    facts.checkpoint_format = str(source.raw.get("checkpoint_format", reader.format))
    facts.layout = reader.describe()
    shapes = {name: weight_of(linear).shape for name, linear in linears(model).items()}
    embeddings = {n: m.weight.shape for n, m in model.named_modules() if m is model.get_input_embeddings()}
    shapes |= embeddings
    kinds: dict[tuple[Any, ...], Kind] = {}
    packed: dict[str, PackedWeight] = {}
    for name, headers in source.layers.items():
        if name not in shapes:
            facts.oddities.append(f"{name} is no linear of {facts.architecture}: the folder will not load")
            continue
        packed[name] = source.packed(name, *shapes[name])
        _count(kinds, packed[name].spec, headers, None if name in embeddings else target)
    facts.kinds = sorted(kinds.values(), key=lambda kind: -kind.weights)
    facts.oddities += reader.oddities()
    facts.oddities += _quantized_oddities(facts, packed)


def _count(
    kinds: dict[tuple[Any, ...], Kind],
    spec: WeightSpec,
    headers: Mapping[str, TensorInfo],
    target: Target | None,
) -> None:
    """target: where the layer runs; None for embeddings, which no backend runs."""
    refused, backend = (
        ({}, "look-up") if target is None else (refusals(spec, target), choose(spec, target).name)
    )
    group = "channel" if spec.groups == 1 else spec.group_size
    scales = str(spec.scale_dtype).removeprefix("torch.")
    if spec.double_quant is not None:
        scales += f" as {spec.double_quant.bits}-bit codes"
    like = (spec.bits, spec.data_type, group, spec.sym, spec.desc_act, scales, backend)
    kind = kinds.setdefault((*like, *refused.items()), Kind(*like, refused))
    kind.layers += 1
    kind.weights += spec.in_features * spec.out_features
    kind.bytes += sum(info.bytes for part, info in headers.items() if part.rpartition(".")[2] != "bias")


# --- what is unusual ---------------------------------------------------------------------------------------------


def _quantized_oddities(facts: Facts, packed: Mapping[str, PackedWeight]) -> list[str]:
    specs = {name: weight.spec for name, weight in packed.items()}
    negative = [name for name, weight in packed.items() if bool((weight.decoded_scales() < 0).any())]
    uneven = [n for n, s in specs.items() if s.in_features % _OTHERS_BLOCK or s.out_features % _OTHERS_BLOCK]
    short = [n for n, s in specs.items() if s.in_features % s.group_size]
    reordered = [n for n, s in specs.items() if s.desc_act]
    wide = [n for n, s in specs.items() if s.scale_dtype != torch.float16]
    odd_bits = sorted({s.bits for s in specs.values()} - set(GPTQ_BITS))
    widths = sorted({s.bits for s in specs.values()})
    found = [
        (
            uneven,
            f"have a side that is no multiple of {_OTHERS_BLOCK}: other readers of GPTQ folders refuse them",
        ),
        (short, "end in a short group: other readers refuse or misread them"),
        (
            reordered,
            "need a g_idx (activation order across groups): slower everywhere, refused by some kernels",
        ),
        (
            negative,
            "have negative scales: right here, misread by code that takes a scale's logarithm or size",
        ),
        (wide, "have scales that are not float16: other readers expect float16"),
    ]
    told = [f"{_some(names)} {what}" for names, what in found if names]
    if odd_bits:
        told.append(f"{odd_bits} bits are no GPTQ widths: nothing but woq reads them")
    elif any(s.data_type != "int" or s.double_quant for s in specs.values()):
        told.append("codebooks, float zero points and scales stored as codes are read by woq only")
    elif facts.quant_method == "woq":
        told.append("the layout is read by woq only")
    if facts.checkpoint_format == "gptq_v2":
        told.append(
            "checkpoint_format gptq_v2 (zero points as they are): AutoGPTQ refuses it, newer readers take it"
        )
    if len(widths) > 1:
        told.append(
            f"bits are mixed {widths}: servers that fuse q/k/v or gate/up want one width inside each group"
        )
    return told


def _float_oddities(model: Any) -> list[str]:
    """What a quantization of this float model will meet."""
    path, blocks = find_blocks(model)
    sizes = {weight_of(linear).shape[1] for block in blocks for linear in linears(block).values()}
    ragged = sorted(size for size in sizes if size % 128)
    if not ragged:
        return []
    fits = next((g for g in (64, 32, 16) if all(size % g == 0 for size in sizes)), -1)
    return [
        f"group_size 128 does not divide in_features {ragged} in {path!r}: use {fits}, or on_ragged_group"
    ]


def _some(names: list[str]) -> str:
    first = ", ".join(names[:2])
    return first if len(names) <= 2 else f"{first} and {len(names) - 2} more layers"


# --- sizes -------------------------------------------------------------------------------------------------------


def _floats(index: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Tensors in float by name, block numbers as "*"; vectors (norms, biases) in one entry."""
    matrices: dict[str, list[TensorInfo]] = {}
    vectors = [info for info in index.values() if len(info.shape) < 2]
    for name, info in index.items():
        if len(info.shape) >= 2:
            matrices.setdefault(re.sub(r"\.\d+(?=\.)", ".*", name), []).append(info)
    told = {name: _told(infos) for name, infos in matrices.items()}
    if vectors:
        told["norms and biases"] = _told(vectors)
    return told


def _told(infos: list[TensorInfo]) -> str:
    shapes = sorted({info.shape for info in infos})
    shape = f" {list(shapes[0])}" if len(shapes) == 1 else ""
    dtypes = "/".join(sorted({info.dtype for info in infos}))
    return f"{len(infos)} x {dtypes}{shape}, {human(sum(info.bytes for info in infos))}"
