"""auto-round's own folders: GPTQ's or AWQ's tensors under `quant_method: "auto-round"` and a `packing_format`.

"auto_round:auto_gptq" stores zero points minus 1, its others as they are. The minus 1 is taken from whole words (but for
3 bits), so that a zero point of 0 borrows from its neighbour: adding to whole words undoes it. Where a folder is symmetric the stored
constant itself says which convention it is, and that is believed. Written is auto_gptq, which everything reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from woq.checkpoint import GPTQ_BITS
from woq.errors import CheckpointError
from woq.interop.awq import unpack_gemm
from woq.interop.base import (
    HALVES,
    Found,
    Layer,
    Parts,
    Reader,
    Summary,
    Writer,
    first_refusal,
    order_of,
    pack,
)  # fmt: skip
from woq.interop.gptq import plus_one, usual_settings, whole_and_even
from woq.interop.words import unpack_rows, unpacked
from woq.weights import GPTQ_V1, PackedWeight, QuantizedWeight

METHODS = ("auto-round", "auto_round", "intel/auto-round")
AUTO_GPTQ, AUTO_AWQ = "auto_round:auto_gptq", "auto_round:auto_awq"
FORMATS = ("auto_round", "auto_round:gptqmodel", "auto_round:gptq", AUTO_GPTQ, AUTO_AWQ)


class AutoRoundReader(Reader):
    """The three packings, and settings by layer."""

    format: ClassVar[str] = "auto-round"

    def __init__(self, found: Found) -> None:
        super().__init__(found)
        self.packing = found.one_of("packing_format", FORMATS, default="auto_round")
        self.usual = {"bits": found.integer("bits"), "group_size": found.integer("group_size")}
        self.sym = bool(found.raw.get("sym", True))
        found.one_of("data_type", ("int", "int_sym", "int_asym", None), default="int")
        extra = found.raw.get("extra_config") or {}
        if not isinstance(extra, Mapping) or not all(isinstance(rule, Mapping) for rule in extra.values()):
            raise CheckpointError(f"{found.where}: extra_config is {extra!r}, expected layer -> settings")
        self.extra: Mapping[str, Mapping[str, Any]] = extra

    @classmethod
    def detect(cls, found: Found) -> bool:
        return found.raw.get("quant_method") in METHODS

    def settings(self, layer: Layer) -> tuple[int, int, bool]:
        """(bits, group_size, sym): by the layer's own name first, then by the first pattern that matches."""
        rule = self.extra.get(layer.name) or next(
            (r for pattern, r in self.extra.items() if _matches(pattern, layer.name)), {}
        )
        values = {**self.usual, "sym": self.sym, **rule}
        bits, size = values["bits"], values["group_size"]
        if bits not in GPTQ_BITS or not isinstance(size, int):
            raise layer.refuse(
                f"bits {bits!r}, group_size {size!r}: auto-round's layouts have {list(GPTQ_BITS)} bits"
            )
        return bits, size, bool(values["sym"])

    def read(self, layer: Layer) -> PackedWeight:
        bits, stated, sym = self.settings(layer)
        size, groups = layer.groups(stated)
        n, k = layer.out_features, layer.in_features
        scales = layer.tensor("scales", HALVES, (groups, n)).t()
        if self.packing == AUTO_AWQ:
            codes = unpack_gemm(layer.tensor("qweight", torch.int32, (k, n // 8))).t()
            zeros = unpack_gemm(layer.tensor("qzeros", torch.int32, (groups, n // 8))).t()
            return pack(layer, Parts(codes, scales, zeros), bits, size)
        codes = unpacked(layer, "qweight", bits, (k, n), dim=0).t()
        g_idx = None
        if "g_idx" in layer.headers:
            g_idx = order_of(layer, layer.tensor("g_idx", torch.int32, (k,)), size)
        zeros = self._zeros(layer, bits, groups, sym)
        return pack(layer, Parts(codes, scales, zeros, g_idx), bits, size)

    def _zeros(self, layer: Layer, bits: int, groups: int, sym: bool) -> Tensor:
        """uint8 [N, G], under the convention of the packing, or that which makes a symmetric layer symmetric."""
        stored = unpacked(layer, "qzeros", bits, (groups, layer.out_features), dim=1).t()
        middle = 1 << (bits - 1)
        if sym and bool((stored == middle).all() or (stored == middle - 1).all()):
            return torch.full_like(stored, middle)
        if self.packing != AUTO_GPTQ:
            return stored
        if bits == 3:  # fields that straddle words are packed one by one, so nothing is borrowed
            return (stored + 1).bitwise_and_(7)
        words = layer.tensor("qzeros", torch.int32)
        return unpack_rows(plus_one(words, bits), bits, layer.out_features).t()

    def describe(self) -> str:
        return f"auto-round, {self.packing}"

    def oddities(self) -> list[str]:
        if self.packing == AUTO_GPTQ and not self.sym:
            return [
                "auto-round subtracted 1 from whole words of zero points: other readers misread zero points of 0"
            ]
        return []


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:  # a name that is no pattern
        return False


# --- writing -----------------------------------------------------------------------------------------------------


class AutoRoundWriter(Writer):
    """`auto_round:auto_gptq`, what auto-round itself writes and vLLM, SGLang and transformers read."""

    def why_not(self, weight: QuantizedWeight) -> str | None:
        spec = weight.spec
        return first_refusal(
            (spec.bits in GPTQ_BITS, f"{spec.bits} bits: auto-round's layouts have {list(GPTQ_BITS)}"),
            (not spec.desc_act, "activation order (g_idx): auto-round has no place for it"),
            *whole_and_even(spec),
            (
                bool(weight.zeros.all()),
                "a zero point is 0, which its readers disagree about: convert to gptq_v2",
            ),
        )

    def tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        packed = replace(weight, spec=replace(weight.spec, layout=GPTQ_V1)).pack().tensors()
        del packed["g_idx"]
        return packed

    def config(self, summary: Summary) -> dict[str, Any]:
        usual = usual_settings(summary.specs)
        extra: dict[str, Any] = {}
        for name, spec in summary.specs.items():
            own = {
                "bits": spec.bits,
                "group_size": -1 if spec.groups == 1 else spec.group_size,
                "sym": spec.sym,
            }
            if own != {"bits": usual.bits, "group_size": usual.group_size, "sym": usual.sym}:
                extra[name] = own
        extra |= {name: {"bits": 16, "data_type": "float"} for name in summary.floats if name != summary.head}
        return {
            "quant_method": "auto-round",
            "packing_format": AUTO_GPTQ,
            "bits": usual.bits,
            "group_size": usual.group_size,
            "sym": usual.sym,
            "data_type": "int",
            **({"extra_config": extra} if extra else {}),  # auto-round takes no null here
            "provider": "woq",
        }
