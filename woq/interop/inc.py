"""neural-compressor's folders: the "optimum" layout of its transformers-like API, and both of its torch API's.

*Optimum* is GPTQ v1 with floor(32/b) codes a word, which for 2, 4 and 8 bits is the same bytes. Its g_idx of zeros
means none, its bias of zeros too. *Plain* is [N, K] with words of any width along either dimension, zero points as they
are; symmetric codes are signed and have no zero points; nf4 and fp4 stand there in a numbering of its own.

The torch API writes `quantized_weight.pt` beside `qconfig.json`, settings by layer; the model's config.json has to be
put there too. Which layout a layer has, its shapes tell (`formats.md` section 1.5).
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from woq import codebooks, packing
from woq.errors import CheckpointError
from woq.interop.base import HALVES, Found, Layer, Parts, Reader, order_of, pack
from woq.interop.words import unpack_rows_floor, unpacked
from woq.weights import DataType, PackedWeight

WORDS = (torch.int8, torch.int16, torch.int32, torch.int64)
QCONFIG = "qconfig.json"
_MARKS = {
    "compute_dtype",
    "weight_dtype",
    "quant_lm_head",
}  # keys of its configs that GPTQ folders do not have

# Its codebooks: the values in ascending order, and the signed code of each. A group's scale multiplies the value.
_FP4 = (-12.0, -8.0, -6.0, -4.0, -3.0, -2.0, -0.0625, 0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
_E2M1 = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.0625, 0.0, 0.0625, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BOOKS: dict[str, tuple[DataType, tuple[float, ...], tuple[int, ...]]] = {
    "nf4": ("nf4", codebooks.VALUES["nf4"], (7, 1, 2, 3, 4, 5, 6, 0, -8, -7, -6, -5, -4, -3, -2, -1)),
    "fp4": ("fp4", _FP4, (-5, -6, -3, -4, -1, -2, -7, 0, 1, 6, 7, 4, 5, 2, 3)),
    "fp4_e2m1_bnb": ("fp4", _FP4, (-5, -6, -3, -4, -1, -2, -7, 0, 1, 6, 7, 4, 5, 2, 3)),
    "fp4_e2m1": ("fp4_e2m1", _E2M1, (-1, -2, -3, -4, -5, -6, -7, 0, 1, 2, 3, 4, 5, 6, 7)),
}


def optimum(layer: Layer, bits: int, group_size: int) -> Parts:
    """A layer in the optimum layout. Raises CheckpointError where its tensors do not fit."""
    size, groups = layer.groups(group_size)
    n, k = layer.out_features, layer.in_features
    codes = unpacked(layer, "qweight", bits, (k, n), 0, unpack_rows_floor).t()
    stored = unpacked(layer, "qzeros", bits, (groups, n), 1, unpack_rows_floor).t()
    zeros = (stored + 1).bitwise_and_((1 << bits) - 1)
    g_idx = None
    if "g_idx" in layer.headers:
        g_idx = order_of(layer, layer.tensor("g_idx", torch.int32, (k,)), size)
    return Parts(codes, layer.tensor("scales", HALVES, (groups, n)).t(), zeros, g_idx)


class IncReader(Reader):
    """What `neural_compressor.transformers` saved: rtn, teq, awq, gptq."""

    format: ClassVar[str] = "inc"
    ignored: ClassVar[tuple[str, ...]] = ("scale_bf16_to_fp8",)

    def __init__(self, found: Found) -> None:
        super().__init__(found)
        self.bits, self.group_size = found.integer("bits"), found.integer("group_size")
        if not 2 <= self.bits <= 8:
            raise CheckpointError(f"{found.where}: bits {self.bits}, expected 2 to 8")

    @classmethod
    def detect(cls, found: Found) -> bool:
        method = found.raw.get("quant_method")
        awq = method == "awq" and found.raw.get("backend") == "inc"
        return method in ("rtn", "teq") or awq or (method == "gptq" and found.raw.keys() >= _MARKS)

    def read(self, layer: Layer) -> PackedWeight:
        size, _ = layer.groups(self.group_size)
        return pack(layer, optimum(layer, self.bits, self.group_size), self.bits, size)

    def describe(self) -> str:
        return f"neural-compressor's optimum layout: GPTQ v1, {32 // self.bits} codes a word"

    @property
    def algorithm(self) -> str | None:
        return str(self.found.raw.get("quant_method"))

    def oddities(self) -> list[str]:
        return ["a g_idx and biases of zeros mean none here: readers that trust them are wrong"]


class IncTorchReader(Reader):
    """What neural-compressor's torch API saved: `quantized_weight.pt` and `qconfig.json`."""

    format: ClassVar[str] = "inc-torch"

    def __init__(self, found: Found) -> None:
        super().__init__(found)
        self.settings: dict[str, Mapping[str, Any]] = {}
        for key, algorithms in found.raw.items():
            name = _layer_name(key)
            if name is None or not isinstance(algorithms, Mapping):
                raise CheckpointError(f'{found.where}: {key!r} is no "(layer, type)" with an algorithm')
            for values in algorithms.values():
                self.settings[name] = values

    @classmethod
    def detect(cls, found: Found) -> bool:
        return found.where.name == QCONFIG

    def read(self, layer: Layer) -> PackedWeight:
        values = self.settings.get(layer.name, {})
        data_type = str(values.get("dtype"))
        bits = int(data_type.removeprefix("int") or 0) if data_type[3:].isdigit() else values.get("bits")
        group_size = values.get("group_size")
        if not isinstance(bits, int) or not 2 <= bits <= 8 or not isinstance(group_size, int):
            raise layer.refuse(
                f"{self.found.where} says dtype {data_type}, bits {bits}, group_size {group_size} of it"
            )
        size, groups = layer.groups(group_size)
        if data_type in BOOKS:
            codes = _plain(layer, "qweight", 4, layer.in_features)
            scales = layer.tensor("scales", HALVES, (layer.out_features, groups))
            ours, codes, scales = from_book(layer, data_type, codes, scales)
            return pack(layer, Parts(codes, scales, None, _order(layer, size)), 4, size, ours)
        if not data_type.startswith("int"):
            raise layer.refuse(f"dtype {data_type!r} is not read", f"int and {sorted(BOOKS)} are")
        if _is_optimum(layer, bits, groups):
            return pack(layer, optimum(layer, bits, group_size), bits, size)
        return pack(layer, plain(layer, bits, size, groups), bits, size)

    def describe(self) -> str:
        return "neural-compressor's torch API, layout by layer"


def _is_optimum(layer: Layer, bits: int, groups: int) -> bool:
    """Whether the shapes are those of the optimum layout: everything transposed, zero points always there."""
    n, k = layer.out_features, layer.in_features
    shapes = {part: info.shape for part, info in layer.headers.items()}
    rows = (packing.floor_words(k, bits, torch.int32), packing.dense_words(k, bits))
    return (
        "qzeros" in shapes
        and shapes.get("scales") == (groups, n)
        and shapes["qweight"] in [(r, n) for r in rows]
    )


def plain(layer: Layer, bits: int, size: int, groups: int) -> Parts:
    """A layer of integers in the plain layout. Raises CheckpointError where its tensors do not fit."""
    middle = 1 << (bits - 1)
    codes = _plain(layer, "qweight", bits, layer.in_features)
    if "qzeros" in layer.headers:
        zeros = _plain(layer, "qzeros", bits, groups)
    else:  # symmetric: two's complement in the field
        codes = codes ^ middle
        zeros = torch.full((layer.out_features, groups), middle, dtype=torch.uint8)
    scales = layer.tensor("scales", HALVES, (layer.out_features, groups))
    return Parts(codes, scales, zeros, _order(layer, size))


def _order(layer: Layer, size: int) -> Tensor | None:
    if "g_idx" not in layer.headers:
        return None
    return order_of(layer, layer.tensor("g_idx", torch.int32, (layer.in_features,)), size)


def _plain(layer: Layer, part: str, bits: int, columns: int) -> Tensor:
    """uint8 [N, columns] from words of any width along either dimension, whichever its shape says."""
    n = layer.out_features
    words = layer.tensor(part, WORDS)
    shape, word = tuple(words.shape), words.dtype
    if shape == (n, packing.floor_words(columns, bits, word)):
        return packing.unpack_floor(words, bits, columns)
    if shape == (packing.floor_words(n, bits, word), columns):
        return packing.unpack_floor(words.t().contiguous(), bits, n).t()
    raise layer.refuse(f"{part} is {word} {list(shape)}, which holds no {[n, columns]} codes of {bits} bits")


def from_book(layer: Layer, name: str, fields: Tensor, scales: Tensor) -> tuple[DataType, Tensor, Tensor]:
    """(our data type, codes uint8 [N, K], scales) of neural-compressor's codes: the same values, numbered as ours are.

    fields: uint8 [N, K], the four bits as stored. Raises CheckpointError for a value that our codebook does not have.
    """
    ours, values, signed = BOOKS[name]
    largest = max(values) / codebooks.largest(ours)  # their scale multiplies another range
    table = torch.full((16,), 255, dtype=torch.uint8)
    known = torch.tensor(codebooks.VALUES[ours])
    for value, code in zip(values, signed, strict=True):
        distance, index = (known - value / largest).abs().min(0)
        if distance < 1e-6:
            table[code % 16] = int(index)
    codes = table[fields.to(torch.int64)]
    if bool((codes == 255).any()):
        raise layer.refuse(
            f"{name}: a code means a value that our {ours} does not have",
            "neural-compressor's fp4_e2m1 has 0.0625 where the standard's E2M1 has 0.5: quantize again",
        )
    return ours, codes, scales if largest == 1 else scales * largest


def _layer_name(key: str) -> str | None:
    """The name in "('model.layers.0.q', 'Linear')"."""
    try:
        name = ast.literal_eval(key)
    except (ValueError, SyntaxError):
        return None
    return name[0] if isinstance(name, tuple) and len(name) == 2 and isinstance(name[0], str) else None
