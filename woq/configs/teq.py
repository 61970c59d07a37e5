"""TEQ (Cheng et al., 2023): AWQ's input scales, trained instead of searched."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from woq.configs.base import FoldingConfig, TrainedConfig


class TeqConfig(FoldingConfig, TrainedConfig):
    """Trainable equivalent transformation."""

    quant_method: Literal["teq"] = "teq"
    iters: int = Field(50, ge=0, strict=True)
    """Training steps a block; 0: AWQ's scales as they were searched."""
