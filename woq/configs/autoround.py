"""AutoRound (Cheng et al., 2023): rounding offsets and clipping, trained block by block."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from woq.configs.base import TrainedConfig
from woq.configs.types import Count


class AutoRoundConfig(TrainedConfig):
    """AutoRound. `optimizer="signsgd", init="rtn", drift_correction=1.0` is the published recipe."""

    quant_method: Literal["autoround"] = "autoround"
    minmax_lr: float | None = Field(None, gt=0)
    """Learning rate of the clipping; None: `lr`."""
    optimizer: Literal["signsgd", "adam"] = "adam"
    """How a step follows from a gradient: its sign alone, or Adam's share of it."""
    gradient_accumulate_steps: Count = 1
    """Batches whose gradients are summed for one step."""
    enable_quanted_input: bool = True
    """Train a block on the outputs of the quantized blocks before it, not on those of the float ones."""
    drift_correction: float = Field(0.75, ge=0, le=1)
    """Share of what the quantized blocks before have done to a block's inputs that its outputs are to make up for."""
    lookahead: Literal[0, 1] = 0
    """1: the outputs of the next block, still in float, count as much as the block's own; half as long again a step."""
    enable_minmax_tuning: bool = True
    """Train the clipping too, not the rounding alone."""
    init: Literal["rtn", "gptq"] = "gptq"
    """What rounding to start from."""
    compile: bool = False
    """Run a training step through torch.compile: some ten seconds once a model, pays for blocks of 10^8 weights."""
