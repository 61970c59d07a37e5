"""Choosing scales and zero points: what the stored grid can hold, and that searching never loses."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from woq.quant import Search, dequantize, group_params, quantize

GRIDS = list(itertools.product(range(2, 9), (True, False)))
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def error(w: Tensor, scale: Tensor, zero: Tensor, bits: int, weights: Tensor | None = None) -> Tensor:
    """Squared error of every group, in float64."""
    scale, zero, w = scale.double().unsqueeze(-1), zero.double().unsqueeze(-1), w.double()
    e = (dequantize(quantize(w, scale, zero, bits), scale, zero) - w).square()
    return (e if weights is None else e * weights).sum(-1)


def samples(seed: int = 0) -> Tensor:
    """Groups of every kind: normal, heavy-tailed, one-sided, constant, with a lone outlier, tiny, large, zero."""
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(6, 32, generator=g)
    outlier = torch.randn(2, 32, generator=g) * 0.1
    outlier[0, 3], outlier[1, 5] = 4.0, -4.0
    constant = torch.tensor([[0.7], [-0.7]]).expand(2, 32)
    kinds = (normal, normal**3, normal.abs(), -normal.abs(), outlier, constant, normal * 1e-2, normal * 1e3)
    return torch.cat([*kinds, torch.zeros(1, 32)])


@pytest.mark.parametrize(("bits", "sym"), GRIDS)
def test_mse_is_never_worse_than_minmax(bits: int, sym: bool) -> None:
    w = samples()
    found = {s: error(w, *group_params(w, bits, sym, torch.float16, s), bits) for s in ("minmax", "mse")}
    assert (found["mse"] <= found["minmax"] * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize(("bits", "sym"), GRIDS)
def test_importance_moves_the_error_where_it_matters_less(bits: int, sym: bool) -> None:
    w = samples()[:6]
    importance = torch.linspace(0.01, 4, 32) ** 2
    plain = error(w, *group_params(w, bits, sym, torch.float32), bits, importance)
    weighted = group_params(w, bits, sym, torch.float32, "mse", importance)
    assert (error(w, *weighted, bits, importance) <= plain * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize(("bits", "sym"), GRIDS)
def test_scales_are_storable_and_zeros_are_codes(
    bits: int, sym: bool, search: str, dtype: torch.dtype
) -> None:
    scale, zero = group_params(samples(), bits, sym, dtype, search)  # type: ignore[arg-type]
    assert torch.equal(scale.to(dtype).float(), scale)
    assert scale.isfinite().all()
    assert (scale != 0).all()
    assert torch.equal(zero, zero.round())
    assert ((zero >= 0) & (zero < 1 << bits)).all()
    if sym:
        assert (zero == 1 << (bits - 1)).all()


@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize(("bits", "sym"), GRIDS)
def test_zero_stays_zero(bits: int, sym: bool, search: str) -> None:
    """Zero is on every grid: of a group of zeros, and of a padded group."""
    w = samples()
    scale, zero = group_params(w, bits, sym, torch.float16, search)  # type: ignore[arg-type]
    zeros = torch.zeros_like(w)
    codes = quantize(zeros, scale.unsqueeze(-1), zero.unsqueeze(-1), bits)
    assert (dequantize(codes, scale.unsqueeze(-1), zero.unsqueeze(-1)) == 0).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_asymmetric_minmax_reaches_both_ends(bits: int) -> None:
    w = samples()[:12]
    scale, zero = (p.unsqueeze(-1) for p in group_params(w, bits, False, torch.float32, "minmax"))
    off = (dequantize(quantize(w, scale, zero, bits), scale, zero) - w).abs()
    # Half a step, and up to another half at the ends, where the rounded zero point shifts the grid.
    assert (off <= scale * (1 + 1e-4)).all()


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["positive", "negative"])
def test_one_sided_symmetric_group_is_not_clipped(bits: int, sign: float) -> None:
    """GPTQ's own rule clips the largest weight of an all-positive group at 7/15: 53 % off."""
    w = torch.linspace(0.1, 1.0, 32).unsqueeze(0) * sign
    for search in ("minmax", "mse"):
        scale, zero = (p.unsqueeze(-1) for p in group_params(w, bits, True, torch.float16, search))  # type: ignore[arg-type]
        largest = dequantize(quantize(w, scale, zero, bits), scale, zero)[0, -1]
        assert abs(float(largest) / sign - 1) <= 1.01 / ((1 << bits) - 1), search


@pytest.mark.parametrize("bits", range(2, 9))
def test_negative_scales_only_where_they_help(bits: int) -> None:
    w = samples()
    scale, zero = group_params(w, bits, True, torch.float16, "mse")
    mirrored = error(w, -scale, zero, bits)
    negative = scale < 0
    assert negative.any()  # the largest weight is positive in some groups, and the grid is longer below zero
    assert (error(w, scale, zero, bits)[negative] < mirrored[negative]).all()
    assert (group_params(w, bits, True, torch.float16, "minmax")[0] > 0).all()


@pytest.mark.parametrize("magnitude", [1e-12, 1e-7, 1e-3, 1e4, 1e7])
@pytest.mark.parametrize(("bits", "sym"), [(4, True), (4, False), (8, True), (8, False)])
def test_extreme_magnitudes_stay_finite_and_never_grow(bits: int, sym: bool, magnitude: float) -> None:
    """A scale that the dtype cannot hold costs accuracy, but makes no NaN, and no weight larger than it was."""
    w = samples()[:12] * magnitude
    scale, zero = (p.unsqueeze(-1) for p in group_params(w, bits, sym, torch.float16))
    got = dequantize(quantize(w, scale, zero, bits), scale, zero)
    assert got.isfinite().all()
    assert ((got - w).norm(dim=-1) <= w.norm(dim=-1) * (1 + 1e-6)).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_full_range_lets_code_0_stand_for_the_largest_weight(bits: int) -> None:
    w = samples()
    scale, zero = (
        p.unsqueeze(-1) for p in group_params(w, bits, True, torch.float32, "minmax", grid="full_range")
    )
    extreme = w.gather(-1, w.abs().argmax(-1, keepdim=True))
    assert (zero == 1 << (bits - 1)).all() and (scale < 0).any() and (scale > 0).any()
    some = extreme.squeeze(-1) != 0
    assert torch.allclose(dequantize(torch.zeros_like(scale), scale, zero)[some], extreme[some], rtol=1e-5)
    searched = group_params(w, bits, True, torch.float32, "mse", grid="full_range")
    assert (error(w, *searched, bits) <= error(w, scale[:, 0], zero[:, 0], bits) * (1 + 1e-5)).all()


@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_float_zeros_need_no_rounding(bits: int, search: Search) -> None:
    w = samples()
    scale, zero = group_params(w, bits, False, torch.float16, search, grid="float_zeros")
    assert torch.equal(zero.half().float(), zero) and ((zero >= 0) & (zero < 1 << bits)).all()
    assert (zero != zero.round()).any()
    if search == "minmax":  # the low end is on the grid but for the rounding of scale and zero point
        low, step = w.amin(-1).clamp(max=0), scale
        assert ((zero * scale + low).abs() <= step * (1 << bits) * 2**-10).all()


@given(st.integers(1, 40), st.integers(2, 8), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_groups_do_not_depend_on_each_other(size: int, bits: int, sym: bool, seed: int) -> None:
    w = torch.randn(3, 2, size, generator=torch.Generator().manual_seed(seed))
    scale, zero = group_params(w, bits, sym, torch.float16)
    alone = [group_params(w[i, j], bits, sym, torch.float16) for i in range(3) for j in range(2)]
    assert scale.shape == zero.shape == (3, 2)
    assert torch.equal(scale.flatten(), torch.stack([s for s, _ in alone]))
    assert torch.equal(zero.flatten(), torch.stack([z for _, z in alone]))


def test_chunking_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    w, importance = samples(), torch.rand(32)
    whole = group_params(w, 4, False, torch.float16, "mse", importance)
    monkeypatch.setattr("woq.quant._CHUNK", {"cpu": 64})
    pieces = group_params(w, 4, False, torch.float16, "mse", importance)
    assert all(map(torch.equal, whole, pieces))
