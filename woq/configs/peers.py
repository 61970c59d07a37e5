"""transformers' quantization configs as ours: what a name table cannot say.

GPTQConfig and AutoRoundConfig are read through the aliases. AwqConfig is a GPTQConfig by inheritance and brings that
class's fields along, set or not; BitsAndBytesConfig names an algorithm by two booleans. Only dicts are looked at, so
nothing here needs transformers.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from woq.configs.aliases import ConfigWarning
from woq.errors import ConfigError

# A key that only transformers' GPTQConfig and its children write, always.
_TRANSFORMERS_GPTQ = "module_name_preceding_first_block"

# What AwqConfig inherits and AWQ has no use for, with the value that says nobody asked for it. `zero_point` is AWQ's
# own word for the opposite of `sym`.
_AWQ_INHERITS: dict[str, Any] = {
    "damp_percent": 0.1,
    "desc_act": False,
    "act_group_aware": True,
    "sym": True,
    "true_sequential": True,
    "batch_size": 1,
    "format": "gemm",
    "version": "gemm",
}

# Of bitsandbytes' arguments: the values that ask for what happens anyway, and why any other cannot be given.
_BNB_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "llm_int8_enable_fp32_cpu_offload": ((False,), "a quantized model runs on one device"),
    "llm_int8_has_fp16_weight": ((False,), "quantized weights are not kept in float beside their codes"),
}
_BNB_WITHOUT_EFFECT: dict[str, tuple[tuple[Any, ...], str]] = {
    "llm_int8_threshold": ((6.0,), "activations are never quantized, so there are no outliers to spare"),
    "bnb_4bit_quant_storage": (("uint8",), "codes are packed into 32-bit words"),
}
_BNB_DEFAULT_COMPUTE = "float32"


def from_transformers(class_name: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """A dict that transformers' GPTQConfig, AwqConfig or AutoRoundConfig wrote, without what nobody set in it.

    Any other dict comes back as it is.
    """
    if given.get("packing_format") == "auto_round:gptq":  # what transformers writes, whatever was asked for
        return {name: value for name, value in given.items() if name != "packing_format"}
    if _TRANSFORMERS_GPTQ not in given:
        return given
    kept = dict(given)
    if kept.pop("max_input_length", None) is not None:  # INC's name for seq_len means something else here
        _warn(
            class_name, "max_input_length", given["max_input_length"], "it sizes a buffer of exllama's kernel"
        )
    if "zero_point" in kept:
        inherited = {name for name, default in _AWQ_INHERITS.items() if kept.get(name) == default}
        kept = {name: value for name, value in kept.items() if name not in inherited}
    return kept


def is_bitsandbytes(data: Mapping[str, Any]) -> bool:
    """Whether `data` is what transformers' BitsAndBytesConfig writes."""
    return data.get("quant_method") == "bitsandbytes" or "load_in_4bit" in data or "load_in_8bit" in data


def from_bitsandbytes(data: Mapping[str, Any]) -> dict[str, Any]:
    """The RTN settings that compute what bitsandbytes would store: blocks of 64 in NF4 or FP4 scaled by their largest
    weight, with `bnb_4bit_use_double_quant` 8-bit scales in blocks of 256; or, for LLM.int8(), 8 bits by row.

    A row whose length 64 does not divide takes smaller groups (bitsandbytes lets blocks run across rows).
    Raises ConfigError for what has no counterpart.
    """
    asked = {k: v for k, v in data.items() if v is not None and not k.startswith("_") and k != "quant_method"}
    four, eight = asked.pop("load_in_4bit", False), asked.pop("load_in_8bit", False)
    if four == eight:
        raise ConfigError(
            f"BitsAndBytesConfig: load_in_4bit={four}, load_in_8bit={eight}",
            hint="set exactly one of the two",
        )
    for name, (same, reason) in _BNB_FIXED.items():
        if asked.pop(name, same[0]) not in same:
            raise ConfigError(f"BitsAndBytesConfig.{name}={data[name]!r} is not possible: {reason}")
    for name, (same, reason) in _BNB_WITHOUT_EFFECT.items():
        if asked.pop(name, same[0]) not in same:
            _warn("BitsAndBytesConfig", name, data[name], reason)
    settings: dict[str, Any] = {"quant_method": "rtn", "search": "minmax", "sym": True}
    settings["ignore"] = asked.pop("llm_int8_skip_modules", ())
    kind, double = asked.pop("bnb_4bit_quant_type", "fp4"), asked.pop("bnb_4bit_use_double_quant", False)
    compute = asked.pop("bnb_4bit_compute_dtype", _BNB_DEFAULT_COMPUTE)
    if asked:
        raise ConfigError(f"BitsAndBytesConfig has no field {sorted(asked)}")
    if eight:
        return settings | {"bits": 8, "group_size": -1}
    settings |= {"bits": 4, "group_size": 64, "on_ragged_group": "smaller", "weight_dtype": kind}
    if double:
        settings |= {"double_quant": True, "double_quant_bits": 8, "double_quant_group_size": 256}
    return settings if compute == _BNB_DEFAULT_COMPUTE else settings | {"compute_dtype": compute}


def _warn(class_name: str, name: str, value: Any, reason: str) -> None:
    warnings.warn(f"{class_name}: {name}={value!r} does nothing: {reason}", ConfigWarning, stacklevel=4)
