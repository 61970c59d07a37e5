"""An XPU for a machine without one: what torch's kernels accept and compute there, and a device that is the CPU's.

`XpuKernels` takes the place of the two operators. It checks every tensor as the kernels do (aten/native/mkldnn/xpu in
PyTorch) and as their memory descriptors assume, then decodes the weight element by element, in numpy, by the layout's
definition. `OnCpu` lets tensors be put on a device that is not there: they stay on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from woq.backends import BACKENDS

aten = torch.ops.aten
HALVES = (torch.float16, torch.bfloat16)


def decode_int4(weight: Tensor, group_size: int, scales: Tensor, zeros: Tensor) -> Tensor:
    """float64 [N, K]: nibble i of a word is input 8 * word + i; scales and zeros [K / group_size, N]."""
    words = weight.numpy().view(np.uint32)
    n, k = words.shape[0], words.shape[1] * 8
    result = np.empty((n, k))
    scale, zero = scales.double().numpy(), zeros.numpy().astype(np.int64)
    for column in range(k):
        nibble = (words[:, column // 8] >> np.uint32(4 * (column % 8))) & np.uint32(15)
        g = column // group_size
        result[:, column] = (nibble.astype(np.int64) - zero[g]) * scale[g]
    return torch.from_numpy(result)


def int4(x: Tensor, weight: Tensor, group_size: int, scales: Tensor, zeros: Tensor) -> Tensor:
    """`_weight_int4pack_mm_with_scales_and_zeros`."""
    n, k = weight.shape[0], x.shape[1]
    assert x.dim() == 2 and x.is_contiguous() and x.dtype in HALVES and len(x)
    assert weight.dtype == torch.int32 and weight.shape == (n, k // 8) and weight.stride() == (k // 8, 1)
    assert group_size in (32, 64, 128, 256) and k % group_size == 0
    assert scales.dtype == x.dtype and scales.shape == (k // group_size, n) and scales.stride() == (n, 1)
    assert zeros.dtype == torch.int8 and zeros.shape == scales.shape and zeros.stride() == (n, 1)
    return (x.double() @ decode_int4(weight, group_size, scales, zeros).t()).to(x.dtype)


def int8(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """`_weight_int8pack_mm`."""
    assert x.dim() == 2 and x.is_contiguous() and x.dtype in HALVES and len(x)
    assert weight.dtype == torch.int8 and weight.is_contiguous() and weight.shape[1] == x.shape[1]
    assert scales.dtype == torch.float32 and scales.shape == (len(weight),) and scales.is_contiguous()
    return (x.double() @ (weight.double() * scales.double()[:, None]).t()).to(x.dtype)


class XpuKernels(TorchDispatchMode):
    """The stand-ins in place of the operators, whatever the device; `calls` holds the arguments they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kernels = {
            aten._weight_int4pack_mm_with_scales_and_zeros.default: int4,
            aten._weight_int8pack_mm.default: int8,
        }
        if func not in kernels:
            return func(*args, **(kwargs or {}))
        self.calls.append(args)
        return kernels[func](*args)


class OnCpu(TorchFunctionMode):
    """Whoever asks torch for a tensor on `device` gets it on the CPU. `asked` counts how often that was."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.asked = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:  # naming a device asks for nothing
            return func(*args, **(kwargs or {}))
        named = {name: self._moved(value) for name, value in (kwargs or {}).items()}
        return func(*map(self._moved, args), **named)

    def _moved(self, value: Any) -> Any:
        if isinstance(value, torch.device | str) and str(value).partition(":")[0] == self.device:
            self.asked += 1
            return torch.device("cpu")
        return value


@contextmanager
def device_on_cpu(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[OnCpu]:
    """`device` ("xpu" or "cuda") is there as far as anyone asks; its tensors are in truth the CPU's."""
    with monkeypatch.context() as patch, OnCpu(device) as mode:
        patch.setattr(getattr(torch, device), "is_available", lambda: True)
        yield mode


@contextmanager
def xpu_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[XpuKernels]:
    """An XPU with torch's kernels for it; the backend "xpu" runs there."""
    table = tuple(replace(e, devices=("cpu", "xpu")) if e.name == "xpu" else e for e in BACKENDS)
    with monkeypatch.context() as patch, device_on_cpu("xpu", patch), XpuKernels() as kernels:
        patch.setattr("woq.backends.BACKENDS", table)
        patch.setattr("woq.backends.xpu.has_kernel", lambda operator: True)
        yield kernels
