"""Which device quantizes. The one place that reads `INC_TARGET_DEVICE`."""

from __future__ import annotations

import os

import torch

from woq.errors import ConfigError

DEVICES = ("cuda", "xpu", "cpu")  # in order of preference for "auto"


def available_devices() -> list[str]:
    """The device types that can run something here, best first."""
    present = {"cuda": torch.cuda.is_available(), "xpu": torch.xpu.is_available(), "cpu": True}
    return [name for name in DEVICES if present[name]]


def environment_device() -> str:
    """What INC_TARGET_DEVICE asks for, in lower case; "auto" where it is not set."""
    return os.environ.get("INC_TARGET_DEVICE", "").strip().lower() or "auto"  # noqa: TID251 - the one reader


def quantization_device(requested: str = "auto") -> torch.device:
    """The device that quantization runs on.

    An explicit `requested` ("cpu", "cuda", "cuda:1", "xpu") wins; with "auto", the environment variable
    INC_TARGET_DEVICE (any case; cpu, cuda, xpu or auto) decides; without it, the best device available.
    Raises ConfigError where the device is unknown or not available: neural-compressor silently takes another.
    """
    source = "device"
    if requested == "auto":
        requested = environment_device()
        source = "INC_TARGET_DEVICE"
    available = available_devices()
    if requested == "auto":
        return torch.device(available[0])
    if requested.partition(":")[0] not in available:
        raise ConfigError(
            f"{source}={requested!r} cannot be used here", hint=f"available: {[*available, 'auto']}"
        )
    return torch.device(requested)
