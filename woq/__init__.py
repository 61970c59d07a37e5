"""Weight-only quantization of language models. Public names load what they need when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from woq.hooks import install

if TYPE_CHECKING:
    from woq.compat.quantizer import WoqConfig
    from woq.configs import (
        AutoRoundConfig,
        AwqConfig,
        GPTQConfig,
        QuantConfig,
        RtnConfig,
        TeqConfig,
        config_from_dict,
        preset,
    )
    from woq.errors import (
        BackendError,
        CalibrationError,
        CheckpointError,
        ConfigError,
        QuantizationError,
        WoqError,
    )
    from woq.linear import QuantLinear
    from woq.modeling import AutoModelForCausalLM, quantize_folder
    from woq.quantization import quantize
    from woq.saving import save_pretrained
    from woq.shared_input import fuse_shared_inputs

__version__ = "0.1.0"

_HOMES = {
    "woq.compat.quantizer": ("WoqConfig",),
    "woq.configs": (
        "AutoRoundConfig",
        "AwqConfig",
        "GPTQConfig",
        "QuantConfig",
        "RtnConfig",
        "TeqConfig",
        "config_from_dict",
        "preset",
    ),
    "woq.errors": (
        "BackendError",
        "CalibrationError",
        "CheckpointError",
        "ConfigError",
        "QuantizationError",
        "WoqError",
    ),
    "woq.linear": ("QuantLinear",),
    "woq.modeling": ("AutoModelForCausalLM", "quantize_folder"),
    "woq.quantization": ("quantize",),
    "woq.saving": ("save_pretrained",),
    "woq.shared_input": ("fuse_shared_inputs",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AutoModelForCausalLM",
    "AutoRoundConfig",
    "AwqConfig",
    "BackendError",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "GPTQConfig",
    "QuantConfig",
    "QuantLinear",
    "QuantizationError",
    "RtnConfig",
    "TeqConfig",
    "WoqConfig",
    "WoqError",
    "__version__",
    "config_from_dict",
    "fuse_shared_inputs",
    "preset",
    "quantize",
    "quantize_folder",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'woq' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


install()
