"""GPTQ folders, v1 and v2, whoever wrote them, and our own: the layout that the rest of this package calls `gptq`.

Legacy AutoGPTQ folders (description in quantize_config.json alone, any file name, safetensors or pickles) are the same
layout. What a folder says of itself is often wrong, and the tensors decide: `desc_act` is what g_idx says, `sym` what
the zero points say.

v1 stores z - 1. Most writers do that field by field; GPTQModel and auto-round subtract from whole words, so that a
zero point of 0 borrows from its neighbour. Adding to whole words undoes it exactly: their asymmetric files become v2
that way (`formats.md` 9.3).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from woq import packing
from woq.checkpoint import GPTQ_BITS, FolderFormat, describe_specs
from woq.configs.base import LayerSettings
from woq.interop.base import Found, Layer, Reader, Summary, Writer, first_refusal
from woq.weights import GPTQ_V1, GPTQ_V2, TENSORS, Layout, PackedWeight, QuantizedWeight, WeightSpec

BLOCK = 32  # codes that other packers handle at once: both sides of a matrix must be multiples


class GptqReader(Reader):
    """GPTQ v1, v2, and the folders of this package."""

    format: ClassVar[str] = "gptq"
    parts: ClassVar[tuple[str, ...]] = TENSORS

    def __init__(self, found: Found) -> None:
        super().__init__(found)
        self.form = FolderFormat.parse(described(found.raw), found.where)
        self.subtracted_from_words = self.form.layout == GPTQ_V1 and _writer(found.raw) == "gptqmodel"

    @classmethod
    def detect(cls, found: Found) -> bool:
        method = found.raw.get("quant_method")
        legacy = method is None and {"bits", "group_size"} <= found.raw.keys() and "w_bit" not in found.raw
        return method in ("gptq", "woq") or legacy

    def read(self, layer: Layer) -> PackedWeight:
        spec = self.form.spec(layer.name, layer.in_features, layer.out_features, layer.headers)
        packed = layer.folder.packed(layer.name, spec, layer.headers)
        if self.subtracted_from_words:
            packed = add_to_words(packed)
        return as_the_zeros_say(packed)

    def describe(self) -> str:
        layout = self.form.layout
        word = str(layout.compression_dtype).removeprefix("torch.")
        zeros = "minus 1" if layout.zero_offset else "as they are"
        return (
            f"{layout.packing}, {word} along dimension {layout.compression_dim}, zero points stored {zeros}"
        )

    @property
    def algorithm(self) -> str | None:
        config = self.form.config
        return None if config is None else config.quant_method

    def oddities(self) -> list[str]:
        told = []
        if self.found.raw.get("sym") is None:
            told.append(
                "the description does not say sym: told from the zero points (GPTQModel assumes true)"
            )
        if self.subtracted_from_words:
            told.append(
                "GPTQModel wrote these v1 zero points by arithmetic on whole words: other readers misread zero points of 0"
            )
        return told


def described(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The description with the names of today: older writers had others, or left out what was the only possibility."""
    older = {"w_bit": "bits", "q_group_size": "group_size"}
    renamed = {older.get(key, key): value for key, value in raw.items()}
    return {"quant_method": "gptq", **renamed}


def _writer(raw: Mapping[str, Any]) -> str | None:
    """The program that wrote the folder, as GPTQModel notes it: {"meta": {"quantizer": ["gptqmodel:1.2"]}}."""
    meta = raw.get("meta")
    told = meta.get("quantizer") if isinstance(meta, Mapping) else None
    first = told[0] if isinstance(told, list) and told else told
    return first.partition(":")[0] if isinstance(first, str) else None


def add_to_words(packed: PackedWeight) -> PackedWeight:
    """A v1 weight whose writer subtracted 1 from every field by arithmetic on whole words, as v2."""
    assert packed.qzeros is not None  # v1 folders of others hold whole numbers
    words = plus_one(packed.qzeros, packed.spec.bits)
    return replace(packed, spec=replace(packed.spec, layout=GPTQ_V2), qzeros=words)


# What GPTQModel takes from its 32-bit words of zero points: a 1 in every field, but for 3 bits, where its constants for
# three words in turn set other bits. Whatever they mean, adding them gives back what it had.
_SUBTRACTED = {
    2: (0x55555555,),
    3: (0x24924924, 0x92492492, 0x49249249),
    4: (0x11111111,),
    8: (0x01010101,),
}


def plus_one(words: Tensor, bits: int) -> Tensor:
    """int32 [R, W] with what a writer that subtracts from whole words took away added again."""
    constants = torch.tensor(_SUBTRACTED[bits], device=words.device)
    repeated = constants.repeat(-(-words.shape[1] // len(constants)))[: words.shape[1]]
    return (words.to(torch.int64) + repeated).to(torch.int32)  # wraps


def as_the_zeros_say(packed: PackedWeight) -> PackedWeight:
    """A weight that calls itself symmetric but has other zero points is not: backends would pass over them."""
    spec = packed.spec
    if not spec.sym or spec.layout.packing != "gptq" or packed.qzeros is None:
        return packed
    stored = packing.unpack_dense(packed.qzeros.t(), spec.bits, spec.out_features)
    middle = (1 << (spec.bits - 1)) - spec.layout.zero_offset
    return packed if bool((stored == middle).all()) else replace(packed, spec=replace(spec, sym=False))


# --- writing -----------------------------------------------------------------------------------------------------


class GptqWriter(Writer):
    """GPTQ folders that GPTQModel, transformers, vLLM, SGLang, auto-round, neural-compressor and IPEX read."""

    def __init__(self, layout: Layout = GPTQ_V1) -> None:
        self.layout = layout

    def why_not(self, weight: QuantizedWeight) -> str | None:
        spec = weight.spec
        return first_refusal(
            (spec.bits in GPTQ_BITS, f"{spec.bits} bits: GPTQ folders have {list(GPTQ_BITS)}"),
            *whole_and_even(spec),
            (
                not self.layout.zero_offset or bool(weight.zeros.all()),
                "a zero point is 0, which v1 readers take for 2^bits or for a borrow: convert to gptq_v2",
            ),
        )

    def tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        return replace(weight, spec=replace(weight.spec, layout=self.layout)).pack().tensors()

    def config(self, summary: Summary) -> dict[str, Any]:
        specs = {name: replace(spec, layout=self.layout) for name, spec in summary.specs.items()}
        floats = [name for name in summary.floats if name != summary.head]
        return describe_specs(usual_settings(specs), specs, floats, lm_head=summary.head in specs)


def usual_settings(specs: Mapping[str, WeightSpec]) -> LayerSettings:
    """What most layers have; group_size -1 where each has one group."""
    counted = Counter(
        LayerSettings(s.bits, -1 if s.groups == 1 else s.group_size, s.sym) for s in specs.values()
    )
    return counted.most_common(1)[0][0]


def whole_and_even(spec: WeightSpec) -> tuple[tuple[bool, str], ...]:
    """What every format of integer codes asks: whole numbers, and sizes that packers and kernels take."""
    n, k, size = spec.out_features, spec.in_features, spec.group_size
    return (
        (spec.data_type == "int", f"the data type {spec.data_type!r}: only whole numbers can be told"),
        (k % BLOCK == 0, f"in_features {k} is no multiple of {BLOCK}"),
        (n % BLOCK == 0, f"out_features {n} is no multiple of {BLOCK}"),
        (k % size == 0, f"group_size {size} does not divide in_features {k}: the last group is short"),
    )


def v1() -> GptqWriter:
    """Zero points minus 1: for symmetric folders, the one that everybody reads."""
    return GptqWriter(GPTQ_V1)


def v2() -> GptqWriter:
    """Zero points as they are."""
    return GptqWriter(GPTQ_V2)
