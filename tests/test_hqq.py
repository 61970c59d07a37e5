"""HQQ against a slow version of itself, one group at a time, and against what it is to improve."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.test_quant import samples
from woq.hqq import NORM, hqq_params
from woq.quant import dequantize, group_params, quantize, quantize_between

CASES = list(itertools.product(range(2, 9), ("plain", "float_zeros")))


def error(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
    to_codes = quantize if torch.equal(zero, zero.round()) else quantize_between
    return (dequantize(to_codes(w, scale, zero, bits), scale, zero) - w).abs().pow(NORM).mean(-1)


def slowly(w: list[float], scale: float, zero: float, bits: int, float_zeros: bool) -> tuple[float, float]:
    """Scale and zero point of one group, weight by weight in Python's floats."""
    top = (1 << bits) - 1

    def code(x: float) -> float:
        rounded = round(x / scale + zero) if float_zeros else round(x / scale) + zero
        return min(max(rounded, 0.0), top)

    def cost() -> float:
        return sum(abs(x - scale * (code(x) - zero)) ** NORM for x in w) / len(w)

    best, least, beta = (scale, zero), cost(), 10.0
    for _ in range(20):
        codes, targets = [code(x) for x in w], []
        for x, q in zip(w, codes, strict=True):
            e = x / scale - (q - zero)
            forgiven = max(abs(e) - max(abs(e), 1e-12) ** (NORM - 1) / beta, 0.0) * (1 if e > 0 else -1)
            targets.append(x - scale * forgiven)
        mean = sum(q - t / scale for q, t in zip(codes, targets, strict=True)) / len(w)
        zero = min(max(mean, 0.0), top)
        if float_zeros:
            zero = float(torch.tensor(zero).half())
        else:
            zero = float(round(zero))
            steps = [q - zero for q in codes]
            products = sum(d * t for d, t in zip(steps, targets, strict=True))
            if any(steps) and products:
                scale = float(torch.tensor(products / sum(d * d for d in steps)).half())
        if cost() < least:
            best, least = (scale, zero), cost()
        beta *= 1.01
    return best


@pytest.mark.parametrize(("bits", "grid"), [case for case in CASES if case[0] < 5])
def test_it_is_the_iteration_of_its_head(bits: int, grid: str) -> None:
    w = samples()[:14]
    start = group_params(w, bits, False, torch.float16, "minmax", grid=grid)  # type: ignore[arg-type]
    got = hqq_params(w, bits, False, torch.float16, grid)  # type: ignore[arg-type]
    slow = [
        slowly(group.tolist(), float(scale), float(zero), bits, grid == "float_zeros")
        for group, scale, zero in zip(w, *start, strict=True)
    ]
    scales, zeros = (torch.tensor(part) for part in zip(*slow, strict=True))
    same = torch.isclose(scales, got[0], rtol=2e-3) & torch.isclose(zeros, got[1], atol=2e-2)
    assert (
        same.float().mean() >= 0.8
    )  # ties in rounding may send a group elsewhere, to an error that is much the same
    assert torch.allclose(error(w, scales, zeros, bits), error(w, *got, bits), rtol=0.03)


@pytest.mark.parametrize(("bits", "grid"), CASES)
def test_never_worse_than_the_range_it_starts_from(bits: int, grid: str) -> None:
    w = samples()
    start = group_params(w, bits, False, torch.float16, "minmax", grid=grid)  # type: ignore[arg-type]
    scale, zero = hqq_params(w, bits, False, torch.float16, grid)  # type: ignore[arg-type]
    assert (error(w, scale, zero, bits) <= error(w, *start, bits)).all()
    assert error(w, scale, zero, bits).sum() < error(w, *start, bits).sum()
    assert ((zero >= 0) & (zero < 1 << bits)).all()
    assert torch.equal(zero, zero.half().float() if grid == "float_zeros" else zero.round())


@pytest.mark.parametrize("grid", ["plain", "full_range"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_symmetric_grids_have_their_scale_fitted(bits: int, grid: str) -> None:
    w = samples()
    start = group_params(w, bits, True, torch.float16, "minmax", grid=grid)  # type: ignore[arg-type]
    scale, zero = hqq_params(w, bits, True, torch.float16, grid)  # type: ignore[arg-type]
    assert torch.equal(zero, start[1]) and torch.equal(scale, scale.half().float()) and (scale != 0).all()
    assert (error(w, scale, zero, bits) <= error(w, *start, bits)).all()
    assert error(w, scale, zero, bits).sum() < error(w, *start, bits).sum()


@pytest.mark.parametrize("magnitude", [1e-12, 1e4, 1e7])
@pytest.mark.parametrize("sym", [True, False])
def test_extreme_magnitudes_stay_finite(sym: bool, magnitude: float) -> None:
    w = samples() * magnitude
    for part in hqq_params(w, 4, sym, torch.float16):
        assert part.isfinite().all()


@pytest.mark.parametrize("sym", [True, False])
def test_the_size_of_weights_makes_no_difference(sym: bool) -> None:
    w = samples()[:14]
    scale, zero = hqq_params(w, 3, sym, torch.float32)
    small_scale, small_zero = hqq_params(w / 1024, 3, sym, torch.float32)
    assert torch.equal(zero, small_zero) and torch.allclose(scale, small_scale * 1024)
