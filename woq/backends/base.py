"""What a backend is: one way to compute `x @ W.T` from a packed weight on one kind of device.

`why_not` answers before anything is allocated, so the chooser can list every refusal; `prepare` turns the checkpoint's
layout into the kernel's own, once; `apply` is the hot path and checks nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor

from woq.weights import DataType, PackedWeight, WeightSpec

State = TypeVar("State")
ComputeDtype = Literal["fp32", "bf16", "fp16", "int8"]
COMPUTE_DTYPES: tuple[ComputeDtype, ...] = get_args(ComputeDtype)


@dataclass(frozen=True)
class Target:
    """Where a layer is to run: the device, and the dtype of the activations that will come in.

    compute_dtype: the least that activations may be rounded to on the way; None: not at all. A permission: a backend
    that has nothing faster at that precision computes with the activations as they are. What each makes of it is in
    docs/cpu.md.
    """

    device: torch.device
    dtype: torch.dtype
    compute_dtype: ComputeDtype | None = None


class Backend(ABC, Generic[State]):
    """One implementation of the quantized linear. Instances hold no per-layer data."""

    name: ClassVar[str]
    data_types: ClassVar[tuple[DataType, ...]] = ("int",)
    """What it computes; the chooser (`woq.backends.why_not`) refuses the rest before it asks `why_not`. How scales are
    stored is no matter here: `PackedWeight.unpack` gives them ready."""

    @abstractmethod
    def why_not(self, spec: WeightSpec, target: Target) -> str | None:
        """None where this backend computes such a layer rightly there, else the reason it does not.

        Asked of layers whose data type is among `data_types`.
        """

    @abstractmethod
    def prepare(self, packed: PackedWeight, target: Target) -> State:
        """The kernel's own form of `packed`, on `target.device`. Called once a layer; does not change `packed`."""

    @abstractmethod
    def apply(self, x: Tensor, state: State) -> Tensor:
        """`x @ W.T`: x [..., in_features] in the target's dtype -> [..., out_features] of the same dtype.

        `QuantLinear` adds the bias and supplies the gradient with respect to x, so neither is a backend's concern.
        Nothing is allocated but the result and scratch that the kernel needs; no host synchronisation.
        """
