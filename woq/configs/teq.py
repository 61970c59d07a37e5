"""TEQ (Cheng et al., 2023): AWQ's input scales, trained instead of searched."""

from __future__ import annotations

from typing import Literal

from woq.configs.base import FoldingConfig, TrainedConfig


class TeqConfig(FoldingConfig, TrainedConfig):
    """Trainable equivalent transformation."""

    quant_method: Literal["teq"] = "teq"
