"""Round-to-nearest against the definition, group by group."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from woq.algorithms import ALGORITHMS, build
from woq.algorithms.rtn import RtnSearch, quantized_before, round_to_nearest
from woq.configs import CONFIGS, AwqConfig, RtnConfig
from woq.errors import ConfigError, QuantizationError
from woq.quant import group_params
from woq.weights import WeightSpec


@pytest.mark.parametrize("in_features", [64, 50])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_weight_takes_the_nearest_point_of_its_grid(
    bits: int, sym: bool, in_features: int, rng: torch.Generator
) -> None:
    weight = torch.randn(6, in_features, generator=rng)
    got = round_to_nearest(weight, WeightSpec(in_features, 6, bits, 16, sym))
    for group in range(got.spec.groups):
        members = slice(16 * group, min(16 * group + 16, in_features))
        scale, zero = got.scales[:, group].float(), got.zeros[:, group].float()
        grid = (torch.arange(1 << bits) - zero[:, None]) * scale[:, None]  # [N, codes]
        nearest = (weight[:, members, None] - grid[:, None]).abs().amin(-1)
        off = (weight[:, members] - got.dequantize()[:, members]).abs()
        assert torch.allclose(off, nearest, atol=1e-6)


@pytest.mark.parametrize("search", ["minmax", "mse", "hqq"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_float_zeros_too(bits: int, search: RtnSearch, rng: torch.Generator) -> None:
    weight = torch.randn(6, 64, generator=rng)
    spec = WeightSpec(64, 6, bits, 16, False, data_type="int_float_zeros")
    got = round_to_nearest(weight, spec, search)
    points = torch.arange(1 << bits) - got.zeros.float()[..., None]
    grid = (points * got.scales.float()[..., None]).repeat_interleave(16, dim=1)  # [N, K, codes]
    nearest = (weight[..., None] - grid).abs().amin(-1)
    assert torch.allclose((weight - got.dequantize()).abs(), nearest, atol=1e-5)


def test_padding_of_a_short_group_moves_nothing(rng: torch.Generator) -> None:
    """The short group's scale is that of its own weights, wherever zero lies."""
    weight = torch.rand(6, 40, generator=rng) + 1.0
    for sym in (True, False):
        got = round_to_nearest(weight, WeightSpec(40, 6, 4, 32, sym))
        scale, zero = group_params(weight[:, 32:], 4, sym, torch.float16)
        assert torch.equal(got.scales[:, 1].float(), scale)
        assert torch.equal(got.zeros[:, 1].float(), zero)


def test_block_is_written_back_and_conv1d_is_turned(rng: torch.Generator) -> None:
    conv, linear = Conv1D(24, 32), nn.Linear(32, 24)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.t())
    block = nn.ModuleDict({"conv": conv, "linear": linear})
    spec = WeightSpec(32, 24, 4, 16, True)
    results = build(RtnConfig()).quantize_block(block, {"conv": spec, "linear": spec}, None)
    assert torch.equal(results["conv"].weight.codes, results["linear"].weight.codes)
    assert torch.equal(conv.weight.t(), linear.weight)
    assert torch.equal(linear.weight, results["linear"].weight.dequantize())
    assert 0 < results["linear"].loss < 0.05


def test_not_finite_names_layer_and_place() -> None:
    block = nn.ModuleDict({"up": nn.Linear(32, 4)})
    with torch.no_grad():
        block["up"].weight[2, 7] = float("nan")
    with pytest.raises(QuantizationError, match=r"layer 'up': 1 weights are NaN or infinite.*\[2, 7\]"):
        build(RtnConfig()).quantize_block(block, {"up": WeightSpec(32, 4, 4, 16, True)}, None)


def test_what_is_not_there_is_said() -> None:
    for method, cls in CONFIGS.items():
        if method in ALGORITHMS:
            assert build(cls()).config == cls()
        else:
            with pytest.raises(ConfigError, match=f"'{method}' is not implemented; available: .*gptq"):
                build(cls())
    assert AwqConfig().quant_method == "awq"


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("sym", [True, False])
def test_weights_that_were_quantized_before_keep_their_range(
    sym: bool, bits: int, rng: torch.Generator
) -> None:
    """Out of 4-bit blocks of 32, as a GGUF file holds them; true float weights are searched."""
    true = torch.randn(16, 128, generator=rng)
    blocks = round_to_nearest(true, WeightSpec(128, 16, 4, 32, False), "minmax").dequantize()
    spec = WeightSpec(128, 16, bits, 64, sym)
    assert quantized_before(blocks.view(16, 2, 64)).all() and not quantized_before(true.view(16, 2, 64)).any()
    assert not quantized_before(true.bfloat16().float().view(16, 1, 128)).any()
    assert not quantized_before(true.half().repeat(1, 8).view(16, 1, -1)).any()  # too long to tell
    for weight, kept in ((blocks, bits > 2 and not sym), (true, False)):
        searched, whole = (round_to_nearest(weight, spec, search) for search in ("mse", "minmax"))
        same = (searched.scales == whole.scales) & (searched.zeros == whole.zeros)
        assert same.all() if kept else not same.all()
