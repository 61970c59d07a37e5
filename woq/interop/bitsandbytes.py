"""bitsandbytes folders, as transformers saves them: NF4 and FP4, double quantization included, and LLM.int8.

4 bit: codes of the flattened weight, the even one high in its byte, a scale (absmax) a block of 64 or so. A block that
does not end with its row is cut where rows and blocks both do: the same scales, more often. Scales that are codes
themselves are decoded, in float32, as bitsandbytes does (`formats.md` section 8). LLM.int8 runs as weight-only: what
it does to activations is not done here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from woq import codebooks
from woq.interop.base import Found, Layer, Parts, Reader, pack
from woq.weights import PackedWeight

_STATE = "weight.quant_state.bitsandbytes__"
_TYPES = ("nf4", "fp4")


class FourBitReader(Reader):
    """`load_in_4bit` folders."""

    format: ClassVar[str] = "bitsandbytes"
    marker: ClassVar[str] = "weight.absmax"
    parts: ClassVar[tuple[str, ...]] = (
        "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
        *(_STATE + name for name in _TYPES),
    )  # fmt: skip

    @classmethod
    def detect(cls, found: Found) -> bool:
        return found.raw.get("quant_method") == "bitsandbytes" and bool(found.raw.get("load_in_4bit"))

    def read(self, layer: Layer) -> PackedWeight:
        n, k = layer.out_features, layer.in_features
        name = next((t for t in _TYPES if _STATE + t in layer.headers), None)
        if name is None:
            raise layer.refuse(f"no {_STATE}nf4 or ...fp4; found {sorted(layer.headers)}")
        state = _state(layer, _STATE + name)
        block = state.get("blocksize")
        if state.get("shape") != [n, k] or not isinstance(block, int) or block < 2:
            raise layer.refuse(
                f"the quant_state says shape {state.get('shape')}, blocksize {block}, the model {[n, k]}"
            )
        table = layer.tensor("weight.quant_map", torch.float32, (16,))
        if not torch.allclose(table, torch.tensor(codebooks.VALUES[name]), rtol=0, atol=1e-6):
            raise layer.refuse(f"quant_map is not the table of {name}")
        count = -(-n * k // 2)
        codes = unpack_bytes(layer.tensor("weight", torch.uint8, (count, 1), (1, count)).flatten(), n * k)
        scales = _absmax(layer, state, -(-n * k // block))
        size = math.gcd(block, k)
        firsts = torch.arange(0, n * k, size)
        per_group = scales[firsts // block].reshape(n, k // size)
        return pack(layer, Parts(codes.reshape(n, k), per_group), codebooks.BITS, size, name)  # type: ignore[arg-type]

    def describe(self) -> str:
        return "bitsandbytes 4 bit, codes in bytes over the flattened weight"


class Int8Reader(Reader):
    """`load_in_8bit` folders: LLM.int8."""

    format: ClassVar[str] = "bitsandbytes-int8"
    marker: ClassVar[str] = "SCB"
    parts: ClassVar[tuple[str, ...]] = ("weight", "SCB", "weight_format")

    @classmethod
    def detect(cls, found: Found) -> bool:
        return found.raw.get("quant_method") == "bitsandbytes" and bool(found.raw.get("load_in_8bit"))

    def read(self, layer: Layer) -> PackedWeight:
        n, k = layer.out_features, layer.in_features
        if "weight_format" in layer.headers and bool(layer.tensor("weight_format", torch.uint8).any()):
            raise layer.refuse("weight_format is not 0: only rows as they are can be read")
        codes = layer.tensor("weight", torch.int8, (n, k)).view(torch.uint8) ^ 0x80
        scales = layer.tensor("SCB", torch.float32, (n,)).unsqueeze(1) / 127
        return pack(layer, Parts(codes, scales, torch.full((n, 1), 128, dtype=torch.uint8)), 8, k)

    def describe(self) -> str:
        return "LLM.int8, bytes with a scale a row"

    def oddities(self) -> list[str]:
        return ["LLM.int8 runs as weight-only here: activations are neither quantized nor split by outliers"]


def unpack_bytes(data: Tensor, count: int) -> Tensor:
    """uint8 [B] -> uint8 [count], the even code in a byte's high half."""
    return torch.stack([data >> 4, data & 15], dim=1).flatten()[:count]


def _state(layer: Layer, part: str) -> dict[str, Any]:
    """The JSON in a tensor of bytes."""
    raw = bytes(layer.tensor(part, torch.uint8).flatten().tolist())
    try:
        state = json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise layer.refuse(f"{part} is no JSON: {error}") from error
    if not isinstance(state, dict):
        raise layer.refuse(f"{part} holds a {type(state).__name__}, expected an object")
    return state


def _absmax(layer: Layer, state: Mapping[str, Any], blocks: int) -> Tensor:
    """float32 [blocks]: the scales, decoded where they are codes."""
    if "weight.nested_absmax" not in layer.headers:
        return layer.tensor("weight.absmax", torch.float32, (blocks,))
    codes = layer.tensor("weight.absmax", torch.uint8, (blocks,))
    run, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if not isinstance(run, int) or run < 1 or not isinstance(offset, int | float):
        raise layer.refuse(f"the quant_state says nested_blocksize {run}, nested_offset {offset}")
    table = layer.tensor("weight.nested_quant_map", torch.float32, (256,))
    steps = layer.tensor("weight.nested_absmax", torch.float32, (-(-blocks // run),))
    return table[codes.to(torch.int64)] * steps[torch.arange(blocks) // run] + offset
