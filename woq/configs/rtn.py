"""Round-to-nearest: no data, only a search for each group's scale and zero point."""

from __future__ import annotations

from typing import ClassVar, Literal

from woq.configs.base import QuantConfig
from woq.configs.types import Bits, GroupSize


class RtnConfig(QuantConfig):
    """Round to nearest."""

    takes_codebooks: ClassVar[bool] = True

    quant_method: Literal["rtn"] = "rtn"
    search: Literal["minmax", "mse", "hqq"] = "mse"
    """How scale and zero are chosen: the whole range, the range of least squared error, or HQQ's robust zero point."""
    full_range: bool = False
    """Symmetric only: let the scale's sign follow the largest weight, so that all 2^bits codes are used."""
    double_quant: bool = False
    """Quantize the scales too."""
    double_quant_bits: Bits = 8
    """Width of a scale's code."""
    double_quant_group_size: GroupSize = 256
    """Scales that share a second-level scale; -1 for all of a layer."""
    double_quant_sym: bool = False
    """Symmetric codes for the scales."""
