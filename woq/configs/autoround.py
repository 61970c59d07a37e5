"""AutoRound (Cheng et al., 2023): rounding offsets and clipping, trained block by block with signed gradients."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from woq.configs.base import TrainedConfig
from woq.configs.types import Count


class AutoRoundConfig(TrainedConfig):
    """AutoRound."""

    quant_method: Literal["autoround"] = "autoround"
    minmax_lr: float | None = Field(None, gt=0)
    """Learning rate of the clipping; None: `lr`."""
    gradient_accumulate_steps: Count = 1
    """Batches whose gradients are summed for one step."""
    enable_quanted_input: bool = True
    """Train a block on the outputs of the quantized blocks before it, not on those of the float ones."""
    enable_minmax_tuning: bool = True
    """Train the clipping too, not the rounding alone."""
    init: Literal["rtn", "gptq"] = "rtn"
    """What rounding to start from."""
    compile: bool = False
    """Run training steps through torch.compile: pays only for large blocks."""
