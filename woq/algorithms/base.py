"""What an algorithm is: it turns the linears of one block into integer codes, and may look at the block's inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from woq.configs import QuantConfig
from woq.errors import QuantizationError
from woq.replay import BlockInputs
from woq.weights import QuantizedWeight, WeightSpec

ConfigT = TypeVar("ConfigT", bound=QuantConfig)


@dataclass(frozen=True, eq=False)
class LayerResult:
    """One quantized linear and what is worth telling of it.

    loss:    squared output error on the calibration data relative to the output, tr(D H D') / tr(W H W') with
             D = W - W_q; without data H is the identity
    tokens:  calibration tokens that reached the layer; None where no data was used
    damping: share of the Hessian's mean diagonal that was added to it; None where no Hessian was factored
    note:    what departed from the usual path, "" where nothing did
    """

    weight: QuantizedWeight
    loss: float
    tokens: int | None = None
    damping: float | None = None
    note: str = ""


class Algorithm(ABC, Generic[ConfigT]):
    """One method, set up by its config."""

    needs_data: ClassVar[bool]

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    @property
    def needs_float_stream(self) -> bool:
        """Whether `inputs` must also hold what the float model gives and takes: one more run of every block."""
        return False

    @property
    def needs_following(self) -> bool:
        """Whether `inputs` must also hold the block after the one to quantize: memory for two."""
        return False

    @property
    def runs_float_stream(self) -> bool:
        """Whether `quantize_block` fills in `inputs.float_outputs` itself, on its way."""
        return False

    @abstractmethod
    def quantize_block(
        self, block: nn.Module, specs: Mapping[str, WeightSpec], inputs: BlockInputs | None
    ) -> dict[str, LayerResult]:
        """Quantize the named linears of `block`, which is on one device.

        On return each of them holds its dequantized weight. Other parameters of the block may be rescaled only
        where the block's output stays unchanged (a fold). `inputs` is None where `needs_data` is False; `inputs.outputs` may be filled in.
        """


def float_weight(name: str, weight: Tensor) -> Tensor:
    """`weight` in float32. Raises QuantizationError naming the layer where it is not finite."""
    finite = torch.isfinite(weight)
    if not finite.all():
        n, k = (~finite).nonzero()[0].tolist()
        raise QuantizationError(
            f"layer {name!r}: {int((~finite).sum())} weights are NaN or infinite, the first at [{n}, {k}]",
            hint="the source checkpoint is damaged or overflowed its dtype",
        )
    return weight.float()
