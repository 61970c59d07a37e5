"""What the speed benchmarks share: random weights, the commit, the CPU's name, quantiles."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from woq.weights import QuantizedWeight, WeightSpec

# What decides which kernels run; in the order of /proc/cpuinfo's history.
ISA = (
    "avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16",
)  # fmt: skip

Call = Callable[[], Tensor]
"""One product, timed; the tensor [M, N] that it returns lives as long as this object, or until the next call."""
Layer = Callable[[Tensor], Call]
"""Takes activations, float32 [M, K], untimed."""
Maker = Callable[[QuantizedWeight], tuple[Layer, Tensor | None]]
"""Prepares a weight; also the float weight that the layer multiplies with, where its grid is its own."""


class Absent(Exception):
    """Why an implementation is not measured: it is not installed, or does not compute such a weight."""


def random_weight(spec: WeightSpec, seed: int, device: str) -> QuantizedWeight:
    """Random codes, scales and zero points (and groups, where `spec` has an activation order), made on `device`."""
    gen = torch.Generator(device).manual_seed(seed)
    n, k, g, top = spec.out_features, spec.in_features, spec.groups, 1 << spec.bits
    on: Any = {"device": device, "generator": gen}
    zeros = torch.full((n, g), top // 2, device=device) if spec.sym else torch.randint(0, top, (n, g), **on)
    order = (torch.randperm(k, **on) // spec.group_size).int() if spec.desc_act else None
    return QuantizedWeight(
        spec=spec,
        codes=torch.randint(0, top, (n, k), dtype=torch.uint8, **on),
        scales=(torch.rand(n, g, **on) * 0.01 + 0.005).to(spec.scale_dtype),
        zeros=zeros.to(torch.uint8),
        g_idx=order,
    )


def current_commit() -> str:
    """The commit that this tree stands at, short."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def cpu_name() -> tuple[str, str]:
    """The processor's name, and which of `ISA` it has, joined by spaces (Linux on x86-64)."""
    told: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        told.setdefault(key.strip(), value.strip())
    flags = set(told.get("flags", "").split())
    return told.get("model name", "unknown"), " ".join(flag for flag in ISA if flag in flags)


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    ordered = sorted(values)
    p20, p50, p80 = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8))
    return p20, p50, p80
