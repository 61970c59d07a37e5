"""The public names: `__all__` is the API, and changing it means changing this list."""

from __future__ import annotations

import importlib
from importlib import metadata

import pytest

import woq

PUBLIC = [
    "AutoModelForCausalLM", "AutoRoundConfig", "AwqConfig", "BackendError", "CalibrationError", "CheckpointError",
    "ConfigError", "GPTQConfig", "QuantConfig", "QuantLinear", "QuantizationError", "RtnConfig", "TeqConfig",
    "WoqConfig", "WoqError", "__version__", "config_from_dict", "fuse_shared_inputs", "preset", "quantize", "quantize_folder", "save_pretrained",
]  # fmt: skip
MODULES = ["woq", "woq.calibration", "woq.configs", "woq.evaluation"]


def test_the_api_is_pinned() -> None:
    assert sorted(woq.__all__) == sorted(PUBLIC)


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_there(module: str) -> None:
    loaded = importlib.import_module(module)
    assert loaded.__all__ and all(getattr(loaded, name) is not None for name in loaded.__all__)
    assert len(set(loaded.__all__)) == len(loaded.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        woq.no_such_name  # noqa: B018


def test_the_version_is_the_packages() -> None:
    assert metadata.version("woq") == woq.__version__
