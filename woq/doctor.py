"""What this machine can run: versions, devices, and for typical layers which backend takes them and why others do not."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any

import psutil
import torch

from woq.backends import choose, refusals, why_not
from woq.backends.base import Target
from woq.device import DEVICES, available_devices, environment_device, quantization_device
from woq.errors import ConfigError
from woq.weights import GPTQ_V1, GPTQ_V2, WeightSpec

PACKAGES = (
    "woq", "torch", "transformers", "accelerate", "safetensors", "datasets", "pydantic", "triton",
    "intel-extension-for-pytorch", "onnxruntime", "lm-eval",
)  # fmt: skip
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_FOUR = WeightSpec(4096, 4096, bits=4, group_size=128, sym=True, layout=GPTQ_V1)
LAYERS: dict[str, WeightSpec] = {
    "4 bit, group 128": _FOUR,
    "4 bit, group 128, asymmetric": replace(_FOUR, sym=False, layout=GPTQ_V2),
    "4 bit, group 128, act-order": replace(_FOUR, desc_act=True),
    "3 bit, group 128": replace(_FOUR, bits=3),
    "2 bit, group 128": replace(_FOUR, bits=2),
    "8 bit, group 128": replace(_FOUR, bits=8),
    "8 bit, per channel": replace(_FOUR, bits=8, group_size=4096),
}
"""A square linear of a common model, in the layouts people make."""


@dataclass(frozen=True)
class Choice:
    """Who runs a layer on a device in a dtype. refused: backend -> why not, and what would change that."""

    layer: str
    device: str
    dtype: str
    backend: str
    refused: dict[str, str]


@dataclass
class Diagnosis:
    """All that `woq doctor` tells. devices: type -> what it is, or why it is not there and what would help."""

    versions: dict[str, str]
    machine: dict[str, str]
    devices: dict[str, str]
    quantizes_on: str
    choices: list[Choice] = field(default_factory=list)


def diagnose() -> Diagnosis:
    """Look around. Starts the devices that are there; compiles nothing."""
    diagnosis = Diagnosis(_versions(), _machine(), {d: _device(d) for d in DEVICES}, _quantizes_on())
    for device in available_devices():
        for dtype in DTYPES:
            target = Target(torch.device(device), dtype)
            diagnosis.choices += [_choice(name, spec, target) for name, spec in LAYERS.items()]
    return diagnosis


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _machine() -> dict[str, str]:
    memory = psutil.virtual_memory()
    return {
        "system": platform.platform(),
        "CPU": f"{platform.processor() or platform.machine()}, kernels for {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
        "memory": f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB free",
    }


def _device(kind: str) -> str:
    if kind == "cpu":
        return "available"
    module: Any = torch.cuda if kind == "cuda" else torch.xpu
    built = torch.version.cuda if kind == "cuda" else torch.version.xpu
    if module.is_available():
        names = [module.get_device_name(i) for i in range(module.device_count())]
        return f"available: {', '.join(names)}"
    if built is None:
        return f"not available: this torch is built without {kind}; install torch's {kind} build"
    return f"not available: torch is built for {kind} {built}, but finds no device; is the driver installed?"


def _quantizes_on() -> str:
    """Where `device="auto"` leads, or why it leads nowhere."""
    try:
        return f"{quantization_device()} (INC_TARGET_DEVICE: {environment_device()})"
    except ConfigError as error:
        return f"nowhere: {error.message}; {error.hint}"


def _choice(name: str, spec: WeightSpec, target: Target) -> Choice:
    told = {}
    for backend, reason in refusals(spec, target).items():
        remedy = _remedy(backend, spec, target)
        told[backend] = reason if remedy is None else f"{reason} (it would with {remedy})"
    dtype = str(target.dtype).removeprefix("torch.")
    return Choice(name, target.device.type, dtype, choose(spec, target).name, told)


def _remedy(backend: str, spec: WeightSpec, target: Target) -> str | None:
    """The one change after which `backend` takes such a layer: found by asking it."""
    for dtype in DTYPES:
        if why_not(backend, spec, replace(target, dtype=dtype)) is None:
            return f"dtype {str(dtype).removeprefix('torch.')}"
    changes: dict[str, dict[str, Any]] = {
        "sym": {"sym": True, "layout": GPTQ_V1},
        "desc_act off": {"desc_act": False},
        "group_size 128": {"group_size": 128},
        "group_size 32": {"group_size": 32},
        "group_size -1": {"group_size": spec.in_features},
    }
    for told, change in changes.items():
        if why_not(backend, replace(spec, **change), target) is None:
            return told
    return None
