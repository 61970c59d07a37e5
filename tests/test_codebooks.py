"""The tables are the published ones, and `nearest` is nearest."""

from __future__ import annotations

import pytest
import torch

from woq.codebooks import BITS, VALUES, is_mirrored, largest, nearest, table
from woq.quant import codebook_scales, storable_scale
from woq.weights import CODEBOOKS


def e2m1(code: int) -> float:
    """By the definition of a float with 1 sign, 2 exponent (bias 1) and 1 mantissa bit."""
    sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
    magnitude = (1 + mantissa / 2) * 2 ** (exponent - 1) if exponent else mantissa / 2
    return -magnitude if sign else magnitude


def test_tables() -> None:
    assert set(CODEBOOKS) == set(VALUES) and all(len(values) == 1 << BITS for values in VALUES.values())
    assert VALUES["fp4_e2m1"] == tuple(map(e2m1, range(16)))
    twelfths = [round(12 * value, 4) for value in VALUES["fp4"]]
    assert twelfths[:8] == [0, 0.0625, 8, 12, 4, 6, 2, 3] and twelfths[8:] == [-v for v in twelfths[:8]]
    nf4 = VALUES["nf4"]
    assert list(nf4) == sorted(nf4) and (nf4[0], nf4[7], nf4[15]) == (-1, 0, 1)
    assert [largest(name) for name in CODEBOOKS] == [1, 1, 6]
    assert [is_mirrored(name) for name in CODEBOOKS] == [False, True, True]


def test_nf4_are_quantiles_of_the_normal_distribution() -> None:
    """QLoRA, appendix E: means of neighbouring quantiles, 8 steps above zero and 7 below, scaled to 1."""
    offset = 0.9677083
    above = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1]).flip(0)
    below = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]) / above.max()
    assert torch.allclose(values, torch.tensor(VALUES["nf4"], dtype=torch.float64), atol=2e-7)


@pytest.mark.parametrize("data_type", CODEBOOKS)
def test_nearest_is_nearest(data_type: str, rng: torch.Generator) -> None:
    x = torch.randn(500, generator=rng) * largest(data_type) * 0.7
    values = table(data_type, x)
    best = (x[:, None] - values).abs().amin(1)
    assert torch.equal((values[nearest(x, data_type)] - x).abs(), best)
    assert torch.equal(values[nearest(values, data_type)], values)


@pytest.mark.parametrize("data_type", CODEBOOKS)
def test_scales_cover_the_group_or_err_less(data_type: str, rng: torch.Generator) -> None:
    w = torch.randn(6, 5, 32, generator=rng)
    covering = codebook_scales(w, data_type, torch.float16, "minmax")
    assert torch.equal(covering, storable_scale(w.abs().amax(-1) / largest(data_type), torch.float16))
    searched = codebook_scales(w, data_type, torch.float16, "mse")
    costs = torch.rand(5, 32, generator=rng)
    weighted = codebook_scales(w, data_type, torch.float16, "mse", costs)

    def error(scale: torch.Tensor, cost: torch.Tensor | float = 1.0) -> torch.Tensor:
        codes = nearest(w / scale[..., None], data_type)
        return ((table(data_type, w)[codes] * scale[..., None] - w).square() * cost).sum(-1)

    assert (error(searched) <= error(covering)).all() and error(searched).sum() < error(covering).sum()
    assert (error(weighted, costs) <= error(searched, costs)).all()
    assert (
        codebook_scales(w * 0, data_type, torch.float16) > 0
    ).all()  # zeros need no scale, but divide by it
