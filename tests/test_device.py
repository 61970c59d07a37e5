"""INC_TARGET_DEVICE, in any case; a device that is not there is an error and never another device."""

from __future__ import annotations

import pytest
import torch

from woq.device import available_devices, quantization_device
from woq.errors import ConfigError


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INC_TARGET_DEVICE", raising=False)


@pytest.mark.parametrize("value", ["cpu", "CPU", "Cpu", " cpu "])
def test_environment_in_any_case(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INC_TARGET_DEVICE", value)
    assert quantization_device() == torch.device("cpu")


@pytest.mark.parametrize("value", [None, "", "auto", "AUTO"])
def test_auto_is_the_best(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is not None:
        monkeypatch.setenv("INC_TARGET_DEVICE", value)
    assert quantization_device().type == available_devices()[0]


@pytest.mark.parametrize("value", ["XPU", "xpu", "cuda", "CUDA:0", "gpu", "tpu"])
def test_missing_or_unknown(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if value.lower().partition(":")[0] in available_devices():
        pytest.skip(f"{value} is here")
    monkeypatch.setenv("INC_TARGET_DEVICE", value)
    with pytest.raises(
        ConfigError, match=rf"INC_TARGET_DEVICE='{value.lower()}'.*\n.*available: .*'cpu', 'auto'"
    ):
        quantization_device()
    with pytest.raises(ConfigError, match=rf"device='{value}'"):
        quantization_device(value)


def test_an_explicit_device_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INC_TARGET_DEVICE", "tpu")
    assert quantization_device("cpu") == torch.device("cpu")


def test_each_device_there_is_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in available_devices():
        monkeypatch.setenv("INC_TARGET_DEVICE", name.upper())
        assert quantization_device().type == name
