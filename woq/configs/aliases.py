"""Peers' names for our fields, and peers' fields that have no meaning here, as tables.

Users come from transformers, GPTQModel, AutoGPTQ, AutoAWQ, neural-compressor (INC), IPEX and auto-round, which name
the same thing differently. `canonical` turns what they wrote into our names before Pydantic sees it, so that a field
is declared, documented and checked once. Two names that disagree about one field are refused, never ranked.

`None` counts as "not given", as in all of these libraries.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

from woq.errors import ConfigError


class ConfigWarning(UserWarning):
    """A configuration field was accepted but has no effect here."""


RENAMED: dict[str, str] = {
    "wbits": "bits",
    "w_bit": "bits",
    "q_group_size": "group_size",
    "use_sym": "sym",
    "dtype": "weight_dtype",
    "data_type": "weight_dtype",
    "pack_dtype": "compression_dtype",
    "modules_to_not_convert": "ignore",
    "lm_head": "quant_lm_head",
    "dynamic": "overrides",
    "block_name_to_quantize": "blocks",
    "layers_block_name": "blocks",
    "inside_layer_modules": "modules_in_block_to_quantize",
    "n_samples": "num_samples",
    "nsamples": "num_samples",
    "seqlen": "seq_len",
    "model_seqlen": "seq_len",
    "max_input_length": "seq_len",
    "pad_max_length": "seq_len",
    "percdamp": "damp_percent",
    "act_order": "desc_act",
    "blocksize": "block_size",
    "use_full_range": "full_range",
    "use_double_quant": "double_quant",
    "double_quant_use_sym": "double_quant_sym",
    "use_auto_scale": "auto_scale",
    "use_auto_clip": "auto_clip",
    "absorb_to_layer": "absorb_layer_dict",
}
"""Another name for the same values."""

_INVERTED = {True: False, False: True}

TRANSLATED: dict[str, tuple[str, Mapping[Any, Any]]] = {
    "zero_point": ("sym", _INVERTED),
    "scheme": ("sym", {"sym": True, "asym": False}),
    "use_mse_search": ("search", {True: "mse", False: "minmax"}),
    "disable_quanted_input": ("enable_quanted_input", _INVERTED),
}
"""Another name and other values: (our field, their value -> ours)."""


class Ignored(NamedTuple):
    """Why a peer's field does nothing here; `same` are the values that ask for what happens anyway, so no warning."""

    reason: str
    same: tuple[Any, ...] = ()


_BACKEND = "the backend is picked when the model is loaded: pass backend= to from_pretrained"
_FORMAT = "the file format follows from sym, compression_dtype and packing"
_FUSE = "modules are never fused, linears alone are replaced"
_BLOCKWISE = "quantization always goes block by block"
_LOADING = "it belongs to from_pretrained"

IGNORED: dict[str, Ignored] = {
    "truncation": Ignored(
        "texts are packed whole; with padding=True they are always cut to seq_len", (False,)
    ),
    "use_cuda_fp16": Ignored("kernels take the activations' own dtype and accumulate in float32"),
    "use_exllama": Ignored(_BACKEND),
    "disable_exllama": Ignored(_BACKEND),
    "disable_exllamav2": Ignored(_BACKEND),
    "exllama_config": Ignored(_BACKEND),
    "use_triton": Ignored(_BACKEND, (False,)),
    "use_marlin": Ignored(_BACKEND, (False,)),
    "backend": Ignored(_BACKEND, ("auto", "inc")),
    "is_marlin_format": Ignored(_FORMAT, (False,)),
    "format": Ignored(_FORMAT, ("gptq", "gptq_v2")),
    "checkpoint_format": Ignored(_FORMAT, ("gptq", "gptq_v2")),
    "export_format": Ignored(_FORMAT),
    "packing_format": Ignored(_FORMAT),
    "version": Ignored(_FORMAT),
    "meta": Ignored("the writer of a checkpoint is recorded when it is saved", ({},)),
    "provider": Ignored("the writer of a checkpoint is recorded when it is saved", ("woq",)),
    "do_fuse": Ignored(_FUSE, (False,)),
    "fuse_max_seq_len": Ignored(_FUSE),
    "modules_to_fuse": Ignored(_FUSE),
    "model_path": Ignored(_LOADING, ("",)),
    "device_map": Ignored(_LOADING),
    "trust_remote_code": Ignored(_LOADING, (False,)),
    "module_name_preceding_first_block": Ignored("block inputs are taken from the model's own forward"),
    "cache_block_outputs": Ignored("a block's outputs are always the next block's inputs", (True,)),
    "layer_wise": Ignored(_BLOCKWISE, (True,)),
    "use_layer_wise": Ignored(_BLOCKWISE, (True,)),
    "use_block_wise": Ignored(_BLOCKWISE, (True,)),
    # IPEX: drop texts shorter than pad_max_length and cut the others to it, against taking each as long as it is.
    "use_max_length": Ignored("texts are packed to exactly seq_len tokens unless padding=True", (True,)),
    "hybrid_order": Ignored("desc_act, static_groups and act_group_aware choose the column order", (False,)),
    "fp8_aware": Ignored("weights are never stored as fp8", (False,)),
    "quant_nontext_module": Ignored("only the repeated blocks are quantized; see blocks", (False,)),
    "double_quant_dtype": Ignored("scales are double-quantized to integers", ("int",)),
}
"""A field that a peer has and that makes no sense here: accepted with a warning that says why."""

_QUANT_METHODS = {"auto-round": "autoround", "intel/auto-round": "autoround", "auto_round": "autoround"}
_NUMBERED_INT = re.compile(r"int(\d)(_fullrange)?")


def aliases_of(fields: Mapping[str, Any]) -> set[str]:
    """Every name beside its own fields that a config with these fields accepts."""
    renamed = {alias for alias, field in RENAMED.items() if field in fields}
    translated = {alias for alias, (field, _) in TRANSLATED.items() if field in fields}
    return renamed | translated | set(IGNORED)


def canonical(class_name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` under our names and values.

    Warns (ConfigWarning) for each field that does nothing here. Raises ConfigError where a peer's value has no
    counterpart, or where two names of one field disagree. Unknown names pass through, for the caller to refuse.
    """
    result: dict[str, Any] = {}
    source: dict[str, str] = {}  # our field -> the name it was given under
    for name, value in given.items():
        if value is None:
            continue
        if name in IGNORED:
            _warn_ignored(class_name, name, value)
            continue
        field, value = _translate(class_name, name, value)
        if field in result and result[field] != value:
            raise ConfigError(
                f"{class_name}: {source[field]}={given[source[field]]!r} contradicts {name}={given[name]!r}, "
                f"both set {field}",
                hint=f"give {field} alone",
            )
        result[field], source[field] = value, name
    return _split_numbered_int(class_name, result)


def _warn_ignored(class_name: str, name: str, value: Any) -> None:
    reason, same = IGNORED[name]
    if value not in same:
        message = f"{class_name}: {name}={value!r} does nothing: {reason}"
        # The caller's line: past this function, `canonical`, the validator, Pydantic's __init__ and ours.
        warnings.warn(message, ConfigWarning, stacklevel=6)


def _translate(class_name: str, name: str, value: Any) -> tuple[str, Any]:
    if name == "quant_method":
        method = value.value if isinstance(value, Enum) else value
        return name, _QUANT_METHODS.get(method, method) if isinstance(method, str) else method
    if name not in TRANSLATED:
        return RENAMED.get(name, name), value
    field, table = TRANSLATED[name]
    for theirs, ours in table.items():
        if theirs == value:
            return field, ours
    raise ConfigError(f"{class_name}.{name} = {value!r}; allowed: {', '.join(map(repr, table))}")


def _split_numbered_int(class_name: str, data: dict[str, Any]) -> dict[str, Any]:
    """INC's weight_dtype "int4" says bits=4 as well."""
    numbered = _NUMBERED_INT.fullmatch(str(data.get("weight_dtype", "")))
    if numbered is None:
        return data
    bits = int(numbered[1])
    if data.get("bits", bits) != bits:
        raise ConfigError(
            f"{class_name}: weight_dtype={data['weight_dtype']!r} contradicts bits={data['bits']!r}",
            hint='give bits alone, or weight_dtype="int"',
        )
    return {**data, "weight_dtype": "int", "bits": bits}
