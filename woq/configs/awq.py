"""AWQ (Lin et al., 2023): inputs that matter are scaled up before rounding, ranges are clipped by output error."""

from __future__ import annotations

from typing import Literal

from woq.configs.base import FoldingConfig


class AwqConfig(FoldingConfig):
    """Activation-aware weight quantization."""

    quant_method: Literal["awq"] = "awq"
    auto_scale: bool = True
    """Search the input scales."""
    auto_clip: bool = True
    """Search how far each group's range is clipped."""
