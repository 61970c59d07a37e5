"""What example scripts take from `neural_compressor.torch.utils`."""

from __future__ import annotations

from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from woq.errors import ConfigError

_DOUBLE_QUANT: dict[str, dict[str, Any]] = {
    "BNB_NF4": {"dtype": "nf4", "bits": 4, "group_size": 32, "use_double_quant": True, "double_quant_bits": 8,
                "double_quant_group_size": 256},
    "GGML_TYPE_Q4_K": {"dtype": "int", "bits": 4, "group_size": 32, "use_sym": False, "use_double_quant": True,
                       "double_quant_bits": 6, "double_quant_use_sym": True, "double_quant_group_size": 8},
}  # fmt: skip


def get_double_quant_config_dict(double_quant_type: str = "BNB_NF4") -> dict[str, Any]:
    """Fields of an `RTNConfig` that computes what "BNB_NF4" or "GGML_TYPE_Q4_K" stores. Raises ConfigError for others."""
    if double_quant_type not in _DOUBLE_QUANT:
        raise ConfigError(f"double_quant_type={double_quant_type!r}", hint=f"one of {list(_DOUBLE_QUANT)}")
    return dict(_DOUBLE_QUANT[double_quant_type])


def get_model_device(model: nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    return next(model.parameters()).device


def move_input_device(data: Any, device: torch.device | str = "cpu") -> Any:
    """Tensors in dicts, tuples and lists, on `device`; anything else as it is."""
    if isinstance(data, Tensor):
        return data.to(device)
    if isinstance(data, dict):
        return {name: move_input_device(value, device) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return type(data)(move_input_device(value, device) for value in data)
    return data


def get_torch_version() -> Version:
    """torch's version without what stands behind a plus."""
    return Version(torch.__version__.split("+")[0])


def is_hpex_available() -> bool:
    """Whether this runs on Gaudi: never."""
    return False
