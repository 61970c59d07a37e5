"""Quantization configs: one frozen Pydantic class per algorithm. Reading one imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from woq.configs.aliases import ConfigWarning, canonical
from woq.configs.autoround import AutoRoundConfig
from woq.configs.awq import AwqConfig
from woq.configs.base import CalibratedConfig, LayerSettings, Override, QuantConfig
from woq.configs.gptq import GPTQConfig
from woq.configs.peers import from_bitsandbytes, is_bitsandbytes
from woq.configs.presets import PRESETS
from woq.configs.rtn import RtnConfig
from woq.configs.teq import TeqConfig
from woq.errors import ConfigError

__all__ = [
    "CONFIGS",
    "PRESETS",
    "AutoRoundConfig",
    "AwqConfig",
    "CalibratedConfig",
    "ConfigWarning",
    "GPTQConfig",
    "LayerSettings",
    "Override",
    "QuantConfig",
    "RtnConfig",
    "TeqConfig",
    "as_config",
    "config_from_dict",
    "preset",
]

CONFIGS: dict[str, type[QuantConfig]] = {
    "rtn": RtnConfig,
    "gptq": GPTQConfig,
    "awq": AwqConfig,
    "teq": TeqConfig,
    "autoround": AutoRoundConfig,
}


def config_from_dict(data: Mapping[str, Any]) -> QuantConfig:
    """The config that `data` describes, of the class its "quant_method" names. Raises ConfigError.

    transformers' GPTQConfig, AwqConfig, AutoRoundConfig and BitsAndBytesConfig are read by their `to_dict()`.
    """
    if is_bitsandbytes(data):
        data = from_bitsandbytes(data)
    method = canonical("config", {"quant_method": data.get("quant_method")}).get("quant_method")
    return _config_class(method).from_dict(data)


def as_config(given: Any) -> QuantConfig:
    """One of our configs, a dict, or a quantization config object of transformers as one of ours. Raises ConfigError."""
    if isinstance(given, QuantConfig):
        return given
    if isinstance(given, Mapping):
        return config_from_dict(given)
    data: Mapping[str, Any] = getattr(given, "to_dict", dict)()
    if "quant_method" not in data:
        raise ConfigError(
            f"quantization_config is a {type(given).__name__}",
            hint="one of woq's configs, a dict, or transformers' GPTQConfig, AwqConfig, AutoRoundConfig or "
            "BitsAndBytesConfig",
        )
    return config_from_dict(data)


def preset(name: str, quant_method: str = "gptq", **changes: Any) -> QuantConfig:
    """The named settings for an algorithm, with fields changed or added. Raises ConfigError.

    >>> preset("W4A16", group_size=64).bits
    4
    """
    if name.upper() not in PRESETS:
        raise ConfigError(f"no preset {name!r}", hint=f"one of {', '.join(PRESETS)}")
    return _config_class(quant_method).from_dict({**PRESETS[name.upper()], **changes})


def _config_class(quant_method: Any) -> type[QuantConfig]:
    if not isinstance(quant_method, str) or quant_method not in CONFIGS:
        raise ConfigError(f"quant_method = {quant_method!r}; allowed: {', '.join(map(repr, CONFIGS))}")
    return CONFIGS[quant_method]
