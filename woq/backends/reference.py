"""The oracle: dequantize the whole weight, then `F.linear`. Any device, any spec; slow and always right."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from woq.backends.base import Backend, Target
from woq.weights import DATA_TYPES, DataType, PackedWeight, WeightSpec


class ReferenceBackend(Backend[PackedWeight]):
    """Dequantizes on every call, so that it holds no more memory than the packed weight."""

    name = "reference"
    data_types: ClassVar[tuple[DataType, ...]] = DATA_TYPES

    def why_not(self, spec: WeightSpec, target: Target) -> str | None:
        return None

    def prepare(self, packed: PackedWeight, target: Target) -> PackedWeight:
        return packed.to(target.device)

    def apply(self, x: Tensor, state: PackedWeight) -> Tensor:
        return F.linear(x, state.unpack().dequantize(x.dtype))
