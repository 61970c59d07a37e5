"""compressed-tensors' `pack-quantized` folders, what llm-compressor writes and vLLM reads.

`weight_packed` is GPTQ's `qweight` transposed: [N, words] of unsigned codes, dense along in_features. Widths that do not
divide 32 were once packed floor(32/b) a word under the same name; the number of words tells which (`formats.md`
section 6). Written are 4 and 8 bits, the widths that all versions take.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from woq.errors import CheckpointError
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
)
from woq.interop.gptq import whole_and_even
from woq.interop.words import pack_rows, unpacked
from woq.weights import PackedWeight, QuantizedWeight

PACK_QUANTIZED = "pack-quantized"
_DENSE_ALWAYS = (2, 4, 8)  # the widths at which both packings are the same


# --- reading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scheme:
    """A config group. targets: names, patterns ("re:...") or a class; group_size: -1 for one per channel."""

    targets: tuple[str, ...]
    bits: int
    group_size: int
    sym: bool


class CompressedTensorsReader(Reader):
    """Folders of llm-compressor and compressed-tensors, weight-only integers."""

    format: ClassVar[str] = "compressed-tensors"
    marker: ClassVar[str] = "weight_packed"
    parts: ClassVar[tuple[str, ...]] = (
        "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
    )  # fmt: skip

    def __init__(self, found: Found) -> None:
        super().__init__(found)
        groups = found.raw.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise CheckpointError(
                f"{found.where}: config_groups is {groups!r}, expected an object with a scheme"
            )
        self.schemes = [self._scheme(str(name), group) for name, group in groups.items()]

    def _scheme(self, name: str, group: Any) -> Scheme:
        """What a config group says. Raises CheckpointError where it is not weight-only integers."""
        where, stated = f"{self.found.where}: config_groups.{name}", self.found.raw.get("format")
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping) or not isinstance(group.get("targets"), list):
            raise CheckpointError(f"{where} is malformed: targets and weights are needed")
        form = group.get("format") or stated
        for key, got, due in (
            ("format", form, PACK_QUANTIZED),
            ("weights.type", weights.get("type", "int"), "int"),
            ("input_activations", group.get("input_activations"), None),
            ("output_activations", group.get("output_activations"), None),
        ):
            if got != due:
                raise CheckpointError(
                    f"{where}.{key} is {got!r}: not weight-only integers", hint=f"{due!r} is read"
                )
        strategy, bits, size = (weights.get(key) for key in ("strategy", "num_bits", "group_size"))
        size = -1 if strategy == "channel" else size
        if strategy not in ("group", "channel") or not isinstance(bits, int) or not isinstance(size, int):
            raise CheckpointError(
                f"{where}.weights: strategy {strategy!r}, num_bits {bits!r}, group_size {size!r}",
                hint="read are channel, and group with a group_size, of 2 to 8 bits",
            )
        if not 2 <= bits <= 8:
            raise CheckpointError(f"{where}.weights.num_bits is {bits}, expected 2 to 8")
        targets = tuple(str(target) for target in group["targets"])
        return Scheme(targets, bits, size, bool(weights.get("symmetric", True)))

    @classmethod
    def detect(cls, found: Found) -> bool:
        return found.raw.get("quant_method") == "compressed-tensors" or "config_groups" in found.raw

    def scheme_of(self, name: str) -> Scheme:
        """The scheme of layer `name`: by its own name or a pattern first, by its class else."""
        for match in (_names, lambda target, _: target == "Linear"):
            for scheme in self.schemes:
                if any(match(target, name) for target in scheme.targets):
                    return scheme
        raise CheckpointError(f"layer {name!r}: no group of {self.found.where} has it as a target")

    def read(self, layer: Layer) -> PackedWeight:
        scheme = self.scheme_of(layer.name)
        bits = scheme.bits
        size, groups = layer.groups(scheme.group_size)
        n, k = layer.out_features, layer.in_features
        shape = layer.tensor("weight_shape", (torch.int64, torch.int32), (2,)).tolist()
        if shape != [n, k]:
            raise layer.refuse(f"weight_shape is {shape}, the model has {[n, k]}")
        codes = unpacked(layer, "weight_packed", bits, (n, k), dim=1)
        g_idx = None
        if "weight_g_idx" in layer.headers:
            g_idx = order_of(layer, layer.tensor("weight_g_idx", torch.int32, (k,)), size)
        zeros = torch.full((n, groups), 1 << (bits - 1), dtype=torch.uint8)
        if not scheme.sym:
            zeros = unpacked(layer, "weight_zero_point", bits, (n, groups), dim=0)
        scales = layer.tensor("weight_scale", HALVES, (n, groups))
        return pack(layer, Parts(codes, scales, zeros, g_idx), bits, size)

    def describe(self) -> str:
        return "compressed-tensors pack-quantized, int32 words along in_features"

    def oddities(self) -> list[str]:
        widths = sorted({scheme.bits for scheme in self.schemes} - set(_DENSE_ALWAYS))
        if not widths:
            return []
        return [
            f"{widths} bits: compressed-tensors before and from 0.18 pack them differently under one name; "
            "the number of words decided"
        ]


def _names(target: str, name: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name


# --- writing -----------------------------------------------------------------------------------------------------


class CompressedTensorsWriter(Writer):
    """`pack-quantized`, with activation order where there is any."""

    def why_not(self, weight: QuantizedWeight) -> str | None:
        spec = weight.spec
        return first_refusal(
            (spec.bits in (4, 8), f"{spec.bits} bits: other widths mean two packings, and versions disagree"),
            *whole_and_even(spec),
        )

    def tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        spec = weight.spec
        named = {
            "weight_packed": pack_rows(weight.codes, spec.bits),
            "weight_scale": weight.scales.contiguous(),
            "weight_shape": torch.tensor([spec.out_features, spec.in_features]),
        }
        if not spec.sym:
            named["weight_zero_point"] = pack_rows(weight.zeros.t(), spec.bits).t().contiguous()
        if weight.g_idx is not None:
            named["weight_g_idx"] = weight.g_idx.to(torch.int32)
        return named

    def config(self, summary: Summary) -> dict[str, Any]:
        kinds: dict[tuple[Any, ...], list[str]] = {}
        for name, s in summary.specs.items():
            key = (s.bits, s.sym, None if s.groups == 1 else s.group_size, s.desc_act)
            kinds.setdefault(key, []).append(name)
        alone = len(kinds) == 1
        return {
            "quant_method": "compressed-tensors",
            "format": PACK_QUANTIZED,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": list(summary.floats),
            "config_groups": {
                f"group_{i}": _group(["Linear"] if alone else names, *kind)
                for i, (kind, names) in enumerate(kinds.items())
            },
        }


def _group(targets: list[str], bits: int, sym: bool, group_size: int | None, ordered: bool) -> dict[str, Any]:
    return {
        "targets": targets,
        "input_activations": None,
        "output_activations": None,
        "weights": {
            "num_bits": bits,
            "type": "int",
            "symmetric": sym,
            "strategy": "channel" if group_size is None else "group",
            "group_size": group_size,
            "dynamic": False,
            "actorder": "group" if ordered else None,
        },
    }
