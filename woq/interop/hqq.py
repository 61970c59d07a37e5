"""HQQ: integer codes with float zero points, which are kept.

    W = (q - zero) * scale, groups in the rows of the weight reshaped to [-1, group_size]       (axis 1)
                            groups in the columns of the weight reshaped to [group_size, -1]    (axis 0)

Codes are packed along the rows of that matrix: it is cut into as many stretches as a word has codes, the first in the
highest bits. Along axis 0 neighbours in a row of the weight have scales of their own; our form holds that as groups of
one feature: exact, at 36 bits a weight. Scales that were quantized themselves are refused (`formats.md` section 8).
Read are transformers' safetensors, where each setting is a tensor, and hqq's own `qmodel.pt`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from woq.interop.base import HALVES, Found, Layer, Parts, Reader, pack
from woq.weights import PackedWeight

_META = ("nbits", "group_size", "shape", "axis", "packing", "view_as_float", "scale", "zero")
_QUANTIZED = ("scale_q", "zero_q", "meta_scale", "meta_zero", "meta.scale_q", "meta.zero_q")
PER_WORD = {
    "8bit_u8": (8, 8),
    "4bit_u8": (4, 8),
    "2bit_u8": (2, 8),
    "3bit_32": (3, 30),
}  # bits, bits used of a word


class HqqReader(Reader):
    """Layers marked by `W_q`."""

    format: ClassVar[str] = "hqq"
    marker: ClassVar[str] = "W_q"
    parts: ClassVar[tuple[str, ...]] = ("W_q", *_META, *(f"meta.{name}" for name in _META), *_QUANTIZED)
    ignored: ClassVar[tuple[str, ...]] = tuple(
        prefix + name
        for prefix in ("", "meta.")
        for name in (
            "channel_wise", "optimize", "round_zero", "quant_scale", "quant_zero", "compute_dtype",
            "unpack_view_dtype", "encoded_state_dict", "stores_quant_config", "offload_meta", "quant_config",
        )
    )  # fmt: skip

    @classmethod
    def detect(cls, found: Found) -> bool:
        alone = not found.raw and all(file.name == "qmodel.pt" for file in found.files)
        return found.raw.get("quant_method") == "hqq" or alone

    def read(self, layer: Layer) -> PackedWeight:
        n, k = layer.out_features, layer.in_features
        if any(part in layer.headers for part in _QUANTIZED):
            raise layer.refuse("its scales or zero points are quantized themselves: not read")
        packing = _text(layer, "packing")
        bits, axis, stated = (_number(layer, name) for name in ("nbits", "axis", "group_size"))
        if packing not in PER_WORD or PER_WORD[packing][0] != bits or _shape(layer) != [n, k]:
            raise layer.refuse(
                f"packing {packing!r} of {bits} bits, shape {_shape(layer)}; the model has {[n, k]}"
            )
        size = stated or (k if axis else n)
        if size < 1 or (n * k if axis == 0 else k) % size:
            raise layer.refuse(
                f"group_size {size} does not divide {'the weight' if axis == 0 else f'in_features {k}'}"
            )
        groups = n * k // size
        rows, columns = (groups, size) if axis else (size, groups)
        codes = unpack(_words(layer), packing, rows, columns)
        if codes is None:
            raise layer.refuse(
                f"W_q is {list(_words(layer).shape)}, not {rows} x {columns} codes as {packing}"
            )
        shape = (rows, 1) if axis else (1, columns)
        scale, zero = (_meta(layer, name, HALVES, shape) for name in ("scale", "zero"))
        dtype = torch.promote_types(scale.dtype, zero.dtype)
        if axis == 0:  # every weight has a scale, that of its column
            scale, zero, size = scale.expand(rows, columns), zero.expand(rows, columns), 1
        scales, zeros = (t.to(dtype).reshape(n, k // size) for t in (scale, zero))
        return pack(layer, Parts(codes.reshape(n, k), scales, zeros), bits, size, "int_float_zeros")

    def describe(self) -> str:
        return "HQQ: codes in stretches, float zero points"

    def oddities(self) -> list[str]:
        asked = self.found.raw.get("quant_config")
        values = asked.get("weight_quant_params") if isinstance(asked, Mapping) else None
        if not isinstance(values, Mapping) or values.get("axis") != 0:
            return []
        return [
            "groups run along out_features (axis 0): every weight has a scale of its own here, at 36 bits a weight"
        ]


def unpack(words: Tensor, packing: str, rows: int, columns: int) -> Tensor | None:
    """uint8 [rows, columns] of packed stretches [W, columns]; None where the number of words does not fit."""
    bits, used = PER_WORD[packing]
    each = used // bits
    if words.dim() != 2 or tuple(words.shape) != (-(-rows // each), columns):
        return None
    shifts = range(used - bits, -1, -bits)
    stretches = [(words >> shift) & ((1 << bits) - 1) for shift in shifts]
    return torch.cat(stretches)[:rows].to(torch.uint8)


def _words(layer: Layer) -> Tensor:
    """W_q as integers: it may be stored as floats of the same bytes, so that distributed training takes it."""
    words = layer.tensor("W_q", (torch.uint8, torch.int32, *HALVES))
    if words.is_floating_point():
        words = words.view(torch.int32 if _text(layer, "packing") == "3bit_32" else torch.uint8)
    return words


def _meta(layer: Layer, name: str, dtypes: Any, *shapes: tuple[int, ...]) -> Tensor:
    """A setting, which older files keep below "meta"."""
    part = f"meta.{name}" if f"meta.{name}" in layer.headers else name
    return layer.tensor(part, dtypes, *shapes)


def _number(layer: Layer, name: str) -> int:
    """A whole number; 0 where there is none (group_size: one group a channel)."""
    if name not in layer.headers and f"meta.{name}" not in layer.headers:
        return 0
    value = _meta(layer, name, (torch.int32, torch.int64, torch.uint8))
    return int(value) if value.numel() == 1 else 0


def _text(layer: Layer, name: str) -> str:
    return bytes(_meta(layer, name, torch.uint8).flatten().tolist()).decode("latin-1")


def _shape(layer: Layer) -> list[int]:
    return [int(size) for size in _meta(layer, "shape", (torch.int64, torch.int32)).tolist()]
