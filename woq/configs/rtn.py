"""Round-to-nearest: no data, only a search for each group's scale and zero point."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from woq.configs.base import QuantConfig
from woq.configs.types import Bits, GroupSize


class RtnConfig(QuantConfig):
    """Round to nearest."""

    takes_codebooks: ClassVar[bool] = True

    quant_method: Literal["rtn"] = "rtn"
    search: Literal["minmax", "mse", "hqq"] = "mse"
    """How scale and zero are chosen: the whole range, the range of least squared error (the whole one in asymmetric groups
    that were quantized before), or HQQ's grid of least |error|^0.7."""
    full_range: bool = False
    """Symmetric only: let the scale's sign follow the largest weight, so that all 2^bits codes are used."""
    float_zeros: bool = False
    """Asymmetric only: keep zero points as floats in scale_dtype, as HQQ does. Read by woq alone."""
    double_quant: bool = False
    """Store the scales as codes too."""
    double_quant_bits: Bits = 8
    """Width of a scale's code."""
    double_quant_group_size: GroupSize = 256
    """Scales that share a second-level scale; -1 for all of a layer."""
    double_quant_sym: bool = False
    """Symmetric codes for the scales."""

    @model_validator(mode="after")
    def _zeros_that_exist(self) -> Self:
        if self.float_zeros and self.sym:
            raise self._refusal(
                "float_zeros=True with sym=True", "sym=False: only asymmetric layers have any"
            )
        if self.full_range and not self.sym:
            raise self._refusal(
                "full_range=True with sym=False", "sym=True: other ranges are always used in full"
            )
        if self.search == "hqq" and self.weight_dtype != "int":
            raise self._refusal(
                f"search='hqq' with weight_dtype={self.weight_dtype!r}", "search='mse' or 'minmax'"
            )
        if self.full_range and self.weight_dtype != "int":
            raise self._refusal(
                f"full_range=True with weight_dtype={self.weight_dtype!r}", "weight_dtype='int'"
            )
        return self
