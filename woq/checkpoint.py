"""The metadata of a quantized folder: what it says of each layer. docs/format.md is the specification.

A folder is the model's config.json with a `quantization_config`, the same dict in quantize_config.json, and
safetensors. Which layers are quantized is what the tensors say; how, is what the dict says; both are checked against
the model's shapes before anything is allocated.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from woq import codebooks
from woq.configs import QuantConfig, config_from_dict
from woq.configs.base import LayerSettings
from woq.errors import CheckpointError
from woq.scales import DoubleQuant
from woq.tensor_files import FLOATS, TensorInfo
from woq.weights import (
    CODEBOOKS,
    DATA_TYPES,
    GPTQ_V1,
    GPTQ_V2,
    DataType,
    Layout,
    WeightSpec,
)

FORMAT_VERSION = 2  # the newest that is read; written is the oldest that tells the truth
GPTQ_BITS = (2, 3, 4, 8)  # widths that other readers of GPTQ folders know


def quantization_dict(
    config: QuantConfig,
    specs: Mapping[str, WeightSpec],
    skipped: Mapping[str, str],
    untied_head: bool,
    own_names: bool,
    embeddings: bool = False,
) -> dict[str, Any]:
    """The `quantization_config` of a folder.

    own_names: tensors have names that only this library knows (experts taken apart). embeddings: those are quantized,
    which nobody else reads either, nor did version 1.
    Where the layout is GPTQ's, all weights are whole numbers of common widths with plain scales, and all names the
    model's, it is a standard GPTQ config that other libraries read (they ignore the key "woq"); else `quant_method` is
    "woq" and nobody else will mistake it.
    Layers that differ from the folder's bits, group_size, sym or data type stand in `dynamic` by exact name; so do
    linears left in float, as GPTQModel and vLLM expect.
    """
    settings = config.to_dict()
    usual = LayerSettings(config.widest_bits, config.group_size, config.sym)
    told = describe_specs(
        usual, specs, skipped, lm_head=config.quant_lm_head, own_names=own_names or embeddings
    )
    newer = {"version": 2} if embeddings else {}
    return told | {
        "true_sequential": bool(settings.get("true_sequential", False)),
        "damp_percent": settings.get("damp_percent", 0.01),
        "woq": {**told["woq"], **newer, "untied_head": untied_head, "config": settings},
    }


def describe_specs(
    usual: LayerSettings,
    specs: Mapping[str, WeightSpec],
    floats: Iterable[str],
    *,
    lm_head: bool,
    own_names: bool = False,
) -> dict[str, Any]:
    """`quantization_dict` for weights that no config of ours made.

    usual: what most layers have. floats: linears that are not quantized. lm_head: whether the output head is.
    """
    layout = next(iter(specs.values())).layout
    common = all(s.bits in GPTQ_BITS for s in specs.values())
    plain = all(s.data_type == "int" and s.double_quant is None for s in specs.values())
    standard = layout.packing == "gptq" and common and plain and not own_names
    form = ("gptq" if layout.zero_offset else "gptq_v2") if standard else f"woq_{layout.packing}"
    return {
        "quant_method": "gptq" if standard else "woq",
        "bits": usual.bits,
        "group_size": usual.group_size,
        "desc_act": any(s.desc_act for s in specs.values()),
        "sym": usual.sym,
        "checkpoint_format": form,
        "format": form,
        "lm_head": lm_head,
        "true_sequential": False,
        "damp_percent": 0.01,  # readers want it between 0 and 1, whatever the algorithm
        "dynamic": _dynamic(usual, specs, floats),
        "provider": "woq",
        "woq": {
            "version": 1 if plain else 2,
            "packing": layout.packing,
            "zero_offset": layout.zero_offset,
            "compression_dtype": str(layout.compression_dtype).removeprefix("torch."),
            "compression_dim": layout.compression_dim,
            **({} if plain else _beyond_version_1(specs)),
        },
    }


def _beyond_version_1(specs: Mapping[str, WeightSpec]) -> dict[str, Any]:
    """The data type that layers have where no rule says otherwise, and how scales are stored."""
    double = next((s for s in specs.values() if s.double_quant is not None), None)
    values: dict[str, Any] = {"data_type": _usual_type(specs)}
    if double is not None and double.double_quant is not None:
        dtype = str(double.scale_dtype).removeprefix("torch.")
        values["double_quant"] = {**asdict(double.double_quant), "scale_dtype": dtype}
    return values


def _usual_type(specs: Mapping[str, WeightSpec]) -> DataType:
    return Counter(s.data_type for s in specs.values()).most_common(1)[0][0]


def _dynamic(usual: LayerSettings, specs: Mapping[str, WeightSpec], skipped: Iterable[str]) -> dict[str, Any]:
    rules: dict[str, Any] = {}
    usual_type = _usual_type(specs)
    for name, spec in specs.items():
        whole_row = usual.group_size == -1 or usual.group_size > spec.in_features
        size = spec.in_features if whole_row else usual.group_size
        kind = (spec.bits, spec.group_size, spec.sym, spec.data_type)
        if kind != (usual.bits, size, usual.sym, usual_type):
            group_size = -1 if spec.group_size == spec.in_features else spec.group_size
            rule = {"bits": spec.bits, "group_size": group_size, "sym": spec.sym}
            own = {} if spec.data_type == usual_type else {"data_type": spec.data_type}
            rules[f"+:^{re.escape(name)}$"] = {**rule, **own}
    for name in skipped:
        rules[f"-:^{re.escape(name)}$"] = {}
    return rules


@dataclass(frozen=True)
class FolderFormat:
    """What a folder's `quantization_config` says of its layers."""

    raw: Mapping[str, Any]
    layout: Layout
    data_type: str = "int"
    double_quant: DoubleQuant | None = None
    decoded_dtype: torch.dtype | None = None  # of scales that are stored as codes

    @classmethod
    def parse(cls, raw: Mapping[str, Any], where: Path) -> FolderFormat:
        """Raises CheckpointError where a needed key is missing or holds what no reader here knows."""
        form = raw.get("checkpoint_format", "gptq")
        layouts = {"gptq": GPTQ_V1, "gptq_v2": GPTQ_V2}
        if form in layouts and raw.get("quant_method") == "gptq":
            layout = layouts[form]
        elif form in ("woq_gptq", "woq_inc_plain") and isinstance(raw.get("woq"), Mapping):
            layout = _own_layout(raw["woq"], where)
        else:
            raise CheckpointError(
                f"{where}: quant_method {raw.get('quant_method')!r} with checkpoint_format {form!r} is not known",
                hint="known: gptq with gptq or gptq_v2, and woq's own",
            )
        for key, kind in (("bits", int), ("group_size", int)):
            if not isinstance(raw.get(key), kind):
                raise CheckpointError(
                    f"{where}: quantization_config.{key} is {raw.get(key)!r}, expected an {kind.__name__}"
                )
        own = raw.get("woq", {})
        if not isinstance(own, Mapping) or not isinstance(own.get("config", {}), Mapping):
            raise CheckpointError(
                f"{where}: quantization_config.woq is malformed: no object, or its config none"
            )
        _check_dynamic(raw, where)
        if (
            raw.get("quant_method") != "woq"
        ):  # a standard folder is what the standard says, whatever else it holds
            return cls(raw, layout)
        return cls(raw, layout, own.get("data_type", "int"), *_own_scales(own.get("double_quant"), where))

    @property
    def config(self) -> QuantConfig | None:
        """The config that made the folder, if `woq` did."""
        own = self.raw.get("woq")
        return config_from_dict(dict(own["config"])) if isinstance(own, Mapping) and "config" in own else None

    @cached_property
    def _rules(
        self,
    ) -> tuple[dict[str, tuple[int, Mapping[str, Any]]], list[tuple[int, re.Pattern[str], Any]]]:
        """The rules of `dynamic` that set something, each with its place: those for one layer by its name, then the others.

        A mixture of experts in several widths has a rule for each of its thousands of layers.
        """
        by_name: dict[str, tuple[int, Mapping[str, Any]]] = {}
        patterns = []
        rules = (self.raw.get("dynamic") or {}).items()
        for place, (rule, values) in enumerate((r, v) for r, v in rules if not r.startswith("-:")):
            pattern = rule.removeprefix("+:")
            name = re.sub(r"\\(.)", r"\1", pattern[1:-1])
            if pattern == f"^{re.escape(name)}$":
                by_name.setdefault(name, (place, values))
            else:
                patterns.append((place, re.compile(pattern), values))
        return by_name, patterns

    def settings(self, name: str) -> tuple[int, int, bool, str]:
        """(bits, group_size, sym, data type) of layer `name`: the first matching rule of `dynamic` over the folder's own."""
        chosen: dict[str, Any] = {key: self.raw.get(key) for key in ("bits", "group_size", "sym")}
        chosen["data_type"] = self.data_type
        by_name, patterns = self._rules
        place, values = by_name.get(name, (sys.maxsize, {}))
        earlier = (rule[2] for rule in patterns if rule[0] < place and rule[1].match(name))
        chosen.update(next(earlier, values))
        sym = chosen["sym"]
        settings = int(chosen["bits"]), int(chosen["group_size"]), True if sym is None else bool(sym)
        return *settings, str(chosen["data_type"])

    def spec(
        self, name: str, in_features: int, out_features: int, tensors: Mapping[str, TensorInfo]
    ) -> WeightSpec:
        """The spec of layer `name`, checked against the tensors' headers. Raises CheckpointError."""
        bits, group_size, sym, data_type = self.settings(name)
        if not 2 <= bits <= 8 or not (group_size == -1 or group_size > 0):
            raise CheckpointError(f"layer {name!r}: bits {bits}, group_size {group_size} are out of range")
        if data_type not in DATA_TYPES or (data_type in CODEBOOKS and bits != codebooks.BITS):
            raise CheckpointError(f"layer {name!r}: data type {data_type!r} with {bits} bits is not known")
        spec = WeightSpec(
            in_features=in_features,
            out_features=out_features,
            bits=bits,
            group_size=in_features if group_size == -1 else min(group_size, in_features),
            sym=sym,
            layout=self.layout,
            data_type=data_type,
            double_quant=self.double_quant if "qscales" in tensors else None,
        )
        missing = spec.packed_shapes().keys() - tensors.keys() - {"g_idx"}
        if missing:
            raise CheckpointError(f"layer {name!r}: {sorted(missing)} missing, found {sorted(tensors)}")
        if spec.double_quant is not None and self.decoded_dtype is not None:
            return replace(spec, scale_dtype=self.decoded_dtype)
        dtype = FLOATS.get(tensors["scales"].dtype)
        if dtype is None:
            raise CheckpointError(
                f"layer {name!r}: scales are {tensors['scales'].dtype}, expected a float dtype"
            )
        return replace(spec, scale_dtype=dtype)


def _check_dynamic(raw: Mapping[str, Any], where: Path) -> None:
    rules = raw.get("dynamic") or {}
    try:
        for rule, values in rules.items():
            re.compile(rule.removeprefix("+:").removeprefix("-:"))
            if not all(isinstance(values.get(key, 0), int) for key in ("bits", "group_size")):
                raise TypeError(f"{rule!r}: bits and group_size must be integers, got {values!r}")
    except (AttributeError, TypeError, re.error) as error:
        raise CheckpointError(f"{where}: quantization_config.dynamic is malformed: {error}") from error


def _own_scales(raw: Any, where: Path) -> tuple[DoubleQuant | None, torch.dtype | None]:
    """How scales are stored as codes, and the dtype they decode to. Raises CheckpointError for what makes no sense."""
    if raw is None:
        return None, None
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS.values()}
    try:
        how = DoubleQuant(int(raw["bits"]), int(raw["group_size"]), bool(raw["sym"]))
        dtype = dtypes[raw["scale_dtype"]]
        if not 2 <= how.bits <= 8 or not (how.group_size == -1 or how.group_size > 0):
            raise ValueError(f"bits {how.bits}, group_size {how.group_size} are out of range")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where}: quantization_config.woq.double_quant is malformed: {error!r}"
        ) from error
    return how, dtype


def _own_layout(own: Mapping[str, Any], where: Path) -> Layout:
    words = {"int8": torch.int8, "int16": torch.int16, "int32": torch.int32, "int64": torch.int64}
    try:
        if own["version"] > FORMAT_VERSION:
            raise CheckpointError(
                f"{where}: format version {own['version']} is newer than {FORMAT_VERSION}", hint="update woq"
            )
        layout = Layout(
            own["packing"], own["zero_offset"], words[own["compression_dtype"]], own["compression_dim"]
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{where}: quantization_config.woq is malformed: {error!r}") from error
    plain = layout.packing == "inc_plain" and layout.zero_offset == 0 and layout.compression_dim in (0, 1)
    if not plain and layout not in (GPTQ_V1, GPTQ_V2):
        raise CheckpointError(
            f"{where}: quantization_config.woq names a layout that does not exist: {layout}"
        )
    return layout
