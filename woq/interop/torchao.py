"""torchao's weight-only integers, as transformers saves them to safetensors: a tensor subclass in pieces.

`<name>._weight_qdata`, `_scale`, `_zero_point` hold the numbers, the file's metadata says of `<name>.weight` which class
they belong to. Read are the plain forms: Int4PlainInt32Tensor, IntxUnpackedToInt8Tensor and Int4Tensor (its zero point
is a float added after scaling). Refused by name are layouts of one device's kernel (tile-packed, preshuffled), and what
quantizes activations too. Pickles of tensor subclasses cannot be read without torchao.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

import torch

from woq import packing
from woq.interop.base import HALVES, Found, Layer, Parts, Reader, pack
from woq.weights import PackedWeight

_MIDDLE = 8  # of unsigned 4-bit codes


class TorchAoReader(Reader):
    """Layers marked by `_weight_qdata`."""

    format: ClassVar[str] = "torchao"
    marker: ClassVar[str] = "_weight_qdata"
    parts: ClassVar[tuple[str, ...]] = tuple(
        f"_weight_{name}" for name in ("qdata", "scale", "zero_point", "scale_and_zero", "act_pre_scale")
    )

    @classmethod
    def detect(cls, found: Found) -> bool:
        return found.raw.get("quant_method") == "torchao"

    def read(self, layer: Layer) -> PackedWeight:
        kind, data = _described(layer)
        readers = {
            "Int4PlainInt32Tensor": _int4_plain,
            "IntxUnpackedToInt8Tensor": _intx,
            "Int4Tensor": _int4,
        }
        if kind not in readers:
            raise layer.refuse(f"{kind} is not read", f"these are: {', '.join(readers)}")
        if "_weight_act_pre_scale" in layer.headers or data.get("activation_quantization"):
            raise layer.refuse("it quantizes or scales activations: not weight-only")
        block = data.get("block_size")
        if not isinstance(block, list) or len(block) != 2 or block[0] != 1 or not isinstance(block[1], int):
            raise layer.refuse(f"block_size is {block!r}, expected [1, group size]")
        size, groups = layer.groups(block[1])
        return readers[kind](layer, data, size, groups)

    def describe(self) -> str:
        return "torchao tensor subclasses in pieces"


def _described(layer: Layer) -> tuple[str, dict[str, Any]]:
    """(class, attributes) of the layer's weight, from the file's metadata."""
    raw = layer.folder.metadata.get(f"{layer.name}.weight")
    try:
        told = json.loads(raw or "")
        return str(told["_type"]), dict(told["_data"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise layer.refuse(f"the file's metadata does not say what its weight is: {raw!r}") from error


def _int4_plain(layer: Layer, _: dict[str, Any], size: int, groups: int) -> PackedWeight:
    """int32 [N, K/8] of unsigned codes, the first lowest; whole zero points."""
    n, k = layer.out_features, layer.in_features
    layer.multiple(8, "in_features")
    codes = packing.unpack_floor(layer.tensor("_weight_qdata", torch.int32, (n, k // 8)), 4, k)
    zeros = layer.tensor("_weight_zero_point", torch.int8, (groups, n))
    if zeros.min() < 0 or zeros.max() > 15:
        raise layer.refuse(f"zero points of {int(zeros.min())} to {int(zeros.max())}, expected 0 to 15")
    scales = layer.tensor("_weight_scale", HALVES, (groups, n)).t()
    return pack(layer, Parts(codes, scales, zeros.t().to(torch.uint8)), 4, size)


def _intx(layer: Layer, data: dict[str, Any], size: int, groups: int) -> PackedWeight:
    """int8 [N, K] of signed codes of 2 to 8 bits; zero points of the same range."""
    n, k = layer.out_features, layer.in_features
    told = data.get("target_dtype")
    name = str(told.get("_data") if isinstance(told, dict) else told).removeprefix("torch.")
    bits = int(name.removeprefix("int")) if name.removeprefix("int").isdigit() else 0
    if not 2 <= bits <= 8:
        raise layer.refuse(f"target_dtype {told!r}, expected int2 to int8")
    middle = 1 << (bits - 1)
    signed = layer.tensor("_weight_qdata", torch.int8, (n, k))
    stored = layer.tensor("_weight_zero_point", (torch.int8, *HALVES), (n, groups))
    scales = layer.tensor("_weight_scale", HALVES, (n, groups))
    if signed.min() < -middle or signed.max() >= middle:
        raise layer.refuse(f"codes of {int(signed.min())} to {int(signed.max())} are not {bits} bits")
    codes = (signed.to(torch.int16) + middle).to(torch.uint8)
    if stored.is_floating_point():
        dtype = torch.promote_types(stored.dtype, scales.dtype)
        zeros = stored.float() + middle
        return pack(layer, Parts(codes, scales.to(dtype), zeros.to(dtype)), bits, size, "int_float_zeros")
    if stored.min() < -middle or stored.max() >= middle:
        raise layer.refuse(f"zero points of {int(stored.min())} to {int(stored.max())} are not {bits} bits")
    return pack(layer, Parts(codes, scales, (stored.to(torch.int16) + middle).to(torch.uint8)), bits, size)


def _int4(layer: Layer, _: dict[str, Any], size: int, groups: int) -> PackedWeight:
    """Bytes [N, K/2] of signed codes, the first low: W = q * scale + zero_point."""
    n, k = layer.out_features, layer.in_features
    layer.multiple(2, "in_features")
    data_bytes = layer.tensor("_weight_qdata", (torch.int8, torch.uint8), (n, k // 2)).view(torch.uint8)
    codes = torch.stack([data_bytes & 15, data_bytes >> 4], dim=-1).reshape(n, k) ^ _MIDDLE
    scales = layer.tensor("_weight_scale", HALVES, (groups, n)).t()
    offsets = layer.tensor("_weight_zero_point", HALVES, (groups, n)).t()
    if not bool(offsets.any()):
        return pack(
            layer, Parts(codes, scales, torch.full(scales.shape, _MIDDLE, dtype=torch.uint8)), 4, size
        )
    if bool((scales == 0).any()):
        raise layer.refuse("a scale is 0 beside a zero point: no code can say that")
    zeros = _MIDDLE - offsets.float() / scales.float()  # in codes, as our form has it
    return pack(layer, Parts(codes, scales.float(), zeros), 4, size, "int_float_zeros")
