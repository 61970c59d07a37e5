"""The backends, best first, and the choice among them.

Adding one is one file and one line. A backend's module is imported only when a layer is to run on one of its
devices, so that `import woq` and CPU users never load Triton or CUDA code.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

from woq.backends.base import Backend, Target
from woq.errors import BackendError
from woq.weights import WeightSpec


@dataclass(frozen=True)
class Entry:
    """A backend's name, the device types it can serve (None: all), where its class is, and whether it must be named."""

    name: str
    devices: tuple[str, ...] | None
    path: str
    by_name_only: bool = False


BACKENDS: tuple[Entry, ...] = (
    Entry("cpu", ("cpu",), "woq.backends.cpu:CpuBackend"),
    Entry("torch", ("cpu",), "woq.backends.cpu_torch:TorchBackend"),
    Entry("xpu", ("xpu",), "woq.backends.xpu:XpuBackend"),
    Entry("cuda", ("cuda",), "woq.backends.cuda:CudaBackend"),
    Entry("triton", ("cuda", "xpu"), "woq.backends.triton:TritonBackend"),
    Entry("ipex", ("cpu", "xpu"), "woq.backends.ipex:IpexBackend", by_name_only=True),
    Entry("reference", None, "woq.backends.reference:ReferenceBackend"),
)


@functools.cache
def load(name: str) -> Backend[Any]:
    """The backend called `name`; one instance a process. Raises BackendError for an unknown name."""
    for entry in BACKENDS:
        if entry.name == name:
            module, _, cls = entry.path.partition(":")
            backend: Backend[Any] = getattr(importlib.import_module(module), cls)()
            return backend
    raise BackendError(f"unknown backend {name!r}", hint=f"one of {[e.name for e in BACKENDS]}, or 'auto'")


def why_not(name: str, spec: WeightSpec, target: Target) -> str | None:
    """None where backend `name` runs such a layer there, else its reason; imports it only for its own devices."""
    entry = next((e for e in BACKENDS if e.name == name), None)
    if entry is not None and entry.devices is not None and target.device.type not in entry.devices:
        return f"runs on {' and '.join(entry.devices)}, not on {target.device.type}"
    backend = load(name)
    if spec.data_type not in backend.data_types:
        return f"computes {' and '.join(backend.data_types)} weights, not {spec.data_type}"
    return backend.why_not(spec, target)


def _automatic() -> list[Entry]:
    """The backends that "auto" chooses from."""
    return [entry for entry in BACKENDS if not entry.by_name_only]


def refusals(spec: WeightSpec, target: Target) -> dict[str, str]:
    """Of the backends made for this kind of device, best first: those before the first that takes such a layer there,
    with their reasons; all of them where none does."""
    reasons: dict[str, str] = {}
    for entry in _automatic():
        if entry.devices is None or target.device.type not in entry.devices:
            continue
        reason = why_not(entry.name, spec, target)
        if reason is None:
            break
        reasons[entry.name] = reason
    return reasons


def choose(spec: WeightSpec, target: Target, requested: str = "auto") -> Backend[Any]:
    """The first backend that can, or the one asked for. Raises BackendError with every reason where none can."""
    names = [e.name for e in _automatic()] if requested == "auto" else [requested]
    reasons = {}
    for name in names:
        reason = why_not(name, spec, target)
        if reason is None:
            return load(name)
        reasons[name] = reason
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise BackendError(
        f"no backend for {spec.out_features}x{spec.in_features}, {spec.bits} bits ({spec.data_type}), "
        f"group {spec.group_size}, {target.dtype} on {target.device}: {listed}",
        hint="backend='auto' falls back to the reference, which runs everything"
        if requested != "auto"
        else None,
    )
