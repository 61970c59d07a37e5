"""Round to nearest: each group's scale and zero point from its own weights, then the nearest code. No data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from woq.algorithms.base import Algorithm, LayerResult, float_weight
from woq.blocks import linears, weight_of, write_back
from woq.codebooks import nearest
from woq.configs import RtnConfig
from woq.errors import ConfigError
from woq.quant import Search, codebook_scales, group_params, quantize
from woq.replay import BlockInputs
from woq.scales import encode
from woq.weights import QuantizedWeight, WeightSpec


def round_to_nearest(
    weight: Tensor, spec: WeightSpec, search: Search = "mse", importance: Tensor | None = None
) -> QuantizedWeight:
    """Quantize float32 `weight` [N, K] on the grids that `group_params` chooses.

    importance: float32 [K], weight of each input feature's squared error, or None. A short last group is filled up
    with zeros, which every grid represents exactly and which therefore move none of its parameters.
    """
    fill = spec.groups * spec.group_size - spec.in_features
    grouped = F.pad(weight, (0, fill)).view(spec.out_features, spec.groups, spec.group_size)
    costs = None if importance is None else F.pad(importance, (0, fill)).view(spec.groups, spec.group_size)
    coded = None
    if spec.is_codebook:
        scales, zeros = codebook_scales(grouped, spec.data_type, spec.scale_dtype, search, costs), None
    else:
        scales, zeros = group_params(grouped, spec.bits, spec.sym, spec.scale_dtype, search, costs)
    if spec.double_quant is not None:  # codes are computed for the scales as they will be read
        coded = encode(scales, spec.double_quant)
        scales = coded.decode(spec.double_quant, spec.scale_dtype).float()
    divisor = torch.where(scales == 0, torch.ones_like(scales), scales).unsqueeze(-1)
    if zeros is None:
        codes = nearest(grouped / divisor, spec.data_type)
        zeros = torch.zeros_like(scales)
    else:
        codes = quantize(grouped, divisor, zeros.unsqueeze(-1), spec.bits)
    return QuantizedWeight(
        spec=spec,
        codes=codes.view(spec.out_features, -1)[:, : spec.in_features].to(torch.uint8),
        scales=scales.to(spec.scale_dtype),
        zeros=zeros.to(torch.uint8),
        scale_codes=coded,
    )


class Rtn(Algorithm[RtnConfig]):
    """See the module's head."""

    needs_data: ClassVar[bool] = False

    def __init__(self, config: RtnConfig) -> None:
        super().__init__(config)
        asked = {
            "search": config.search == "hqq",
            "float_zeros": config.float_zeros,
            "full_range": config.full_range,
        }
        for field, unknown in asked.items():
            if unknown:
                raise ConfigError(
                    f"RtnConfig.{field}={getattr(config, field)!r} is not implemented yet",
                    hint="search 'minmax' or 'mse'",
                )
        self.search: Search = "minmax" if config.search == "minmax" else "mse"

    def quantize_block(
        self, block: nn.Module, specs: Mapping[str, WeightSpec], inputs: BlockInputs | None
    ) -> dict[str, LayerResult]:
        modules = linears(block)
        results = {}
        for name, spec in specs.items():
            weight = float_weight(name, weight_of(modules[name]))
            quantized = round_to_nearest(weight, spec, self.search)
            dequantized = quantized.dequantize()
            loss = (dequantized - weight).square().sum() / weight.square().sum().clamp(min=1e-30)
            write_back(modules[name], dequantized)
            results[name] = LayerResult(quantized, float(loss))
        return results
