"""The second moment, its factor, the damping ladder and the loss it weighs, against float64 linear algebra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from woq.algorithms.hessian import SecondMoment, factor_with_ladder, inverse_factor, relative_error
from woq.errors import CalibrationError


def moment_of(*parts: Tensor) -> Tensor:
    moment = SecondMoment.zeros(parts[0].shape[1], torch.device("cpu"))
    for part in parts:
        moment.add("layer", part)
    return moment.normalized()


@pytest.mark.parametrize("features", [1, 2, 33, 96])
def test_factor_is_that_of_the_damped_inverse(features: int, rng: torch.Generator) -> None:
    x = torch.randn(4 * features, features, generator=rng) @ torch.randn(features, features, generator=rng)
    hessian = moment_of(x)
    factor = inverse_factor(hessian, 0.01)
    assert factor is not None
    assert torch.equal(factor, factor.triu())
    damped = hessian.double()
    damped = damped + 0.01 * damped.diagonal().mean() * torch.eye(features, dtype=torch.float64)
    inverse = torch.linalg.inv(damped)
    got = factor.double().t() @ factor.double()
    assert (got - inverse).norm() < 1e-3 * inverse.norm()


def test_batches_add_up(rng: torch.Generator) -> None:
    x = torch.randn(50, 8, generator=rng)
    assert torch.allclose(moment_of(x[:20], x[20:]), x.t() @ x / 50, atol=1e-6)
    assert torch.allclose(moment_of(x.bfloat16()), moment_of(x), atol=0.05)


def test_not_finite_names_the_layer(rng: torch.Generator) -> None:
    x = torch.randn(5, 8, generator=rng)
    x[2, 3] = float("inf")
    with pytest.raises(CalibrationError, match=r"'layer'.* 1 of 5 tokens"):
        moment_of(x)


def test_singular_is_saved_by_damping(rng: torch.Generator) -> None:
    """Fewer tokens than features: no inverse without damping, one with it."""
    hessian = moment_of(torch.randn(4, 32, generator=rng))
    assert inverse_factor(hessian, 0.0) is None
    factored = factor_with_ladder(hessian, 0.01)
    assert factored is not None
    assert factored[1] == 0.01


def test_ladder_climbs_and_ends(rng: torch.Generator) -> None:
    """A negative eigenvalue that only the second or third rung lifts, and one that none does."""
    q, _ = torch.linalg.qr(torch.randn(16, 16, generator=rng))
    for lowest, expected in ((-0.05, 0.1), (-0.5, 1.0)):
        eigenvalues = torch.ones(16)
        eigenvalues[0] = lowest
        factored = factor_with_ladder(q @ eigenvalues.diag() @ q.t(), 0.01)
        assert factored is not None
        assert factored[1] == pytest.approx(expected)
    eigenvalues[0] = -5.0
    assert factor_with_ladder(q @ eigenvalues.diag() @ q.t(), 0.01) is None


def test_relative_error_is_that_of_the_outputs(rng: torch.Generator) -> None:
    x, w = torch.randn(60, 16, generator=rng), torch.randn(8, 16, generator=rng)
    q = w + 0.1 * torch.randn(8, 16, generator=rng)
    expected = (x @ (w - q).t()).square().sum() / (x @ w.t()).square().sum()
    assert relative_error(w, q, moment_of(x)) == pytest.approx(float(expected), rel=1e-4)
    assert relative_error(w, w, moment_of(x)) == 0.0
