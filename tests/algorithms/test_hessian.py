"""The second moment, its factor, the damping ladder and the loss it weighs, against float64 linear algebra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from woq.algorithms.hessian import (
    FEW_TOKENS,
    SecondMoment,
    _triangular_inverse,
    factor_with_ladder,
    fill_up_rare_experts,
    inverse_factor,
    make_up_for_drift,
    relative_error,
)
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


@pytest.mark.parametrize("features", [5, 8, 37])
def test_a_triangle_is_inverted_by_halves(
    features: int, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("woq.algorithms.hessian._SOLVED_AT_ONCE", 4)
    upper = torch.randn(features, features, generator=rng, dtype=torch.float64).triu_(1) + 3 * torch.eye(
        features
    )
    inverse = _triangular_inverse(upper)
    torch.testing.assert_close(upper @ inverse, torch.eye(features, dtype=torch.float64))
    assert torch.equal(inverse, inverse.triu())


@pytest.mark.parametrize("rows", [7, 40])
def test_drift_is_made_up_for_in_least_squares(rows: int, rng: torch.Generator) -> None:
    """W + W (X'(X_float - X))' (X'X)^-1, whether there are more rows or more features."""
    x = torch.randn(90, 20, generator=rng)
    float_x = x + 0.2 * torch.randn(90, 20, generator=rng)
    moment = SecondMoment.zeros(20, torch.device("cpu"), drifting=True)
    moment.add("layer", x[:50], float_x[:50])
    moment.add("layer", x[50:], float_x[50:])
    order = torch.randperm(20, generator=rng)
    factor = inverse_factor(moment.normalized()[order][:, order], 1e-6)
    assert factor is not None
    weight = torch.randn(rows, 20, generator=rng)
    wanted = torch.linalg.lstsq(x, float_x @ weight.t()).solution.t()
    torch.testing.assert_close(
        make_up_for_drift(weight, moment, factor, order, 1.0), wanted, rtol=1e-3, atol=1e-3
    )
    half = make_up_for_drift(weight, moment, factor, order, 0.5)
    torch.testing.assert_close(half, (weight + wanted) / 2, rtol=1e-3, atol=1e-3)


def test_half_of_a_wide_moment_is_computed_and_mirrored(rng: torch.Generator) -> None:
    x = torch.randn(40, 400, generator=rng)
    moment = moment_of(x)
    torch.testing.assert_close(moment, x.t() @ x / 40, rtol=1e-4, atol=1e-5)
    assert torch.equal(moment, moment.t())


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


def test_a_rare_expert_is_told_what_its_siblings_saw(rng: torch.Generator) -> None:
    """By hand: the mean outer product of the other experts' tokens, weighed as the tokens that lack."""
    names = [*(f"mlp.experts.{i}.{part}" for i in range(4) for part in ("w1", "w3", "w2")), "attn.q"]
    groups = [(f"mlp.experts.{i}.w1", f"mlp.experts.{i}.w3") for i in range(3)]
    groups += [
        ("mlp.experts.3.w3",),
        ("mlp.experts.3.w1",),
        *((f"mlp.experts.{i}.w2",) for i in range(4)),
        ("attn.q",),
    ]
    assert sorted(n for group in groups for n in group) == sorted(names)
    reached = {"mlp.experts.0.w1": 40, "mlp.experts.1.w1": 100, "mlp.experts.2.w1": 5, "mlp.experts.0.w2": 60}
    inputs = {
        g[0]: torch.randn(reached.get(g[0], 0), 6 if "w2" in g[0] else 8, generator=rng) for g in groups
    }
    moments = {name: SecondMoment(x.t() @ x, len(x)) for name, x in inputs.items()}
    filled = fill_up_rare_experts(moments, groups)
    assert filled == {
        "mlp.experts.2.w1": 2, "mlp.experts.2.w3": 2, "mlp.experts.3.w1": 2, "mlp.experts.3.w3": 2,
        "mlp.experts.1.w2": 1, "mlp.experts.2.w2": 1, "mlp.experts.3.w2": 1,
    }  # fmt: skip
    others = torch.cat([inputs["mlp.experts.0.w1"], inputs["mlp.experts.1.w1"]])
    prior = others.t() @ others / 140
    few = inputs["mlp.experts.2.w1"]
    expected = (few.t() @ few + (FEW_TOKENS - 5) * prior) / FEW_TOKENS
    assert torch.allclose(moments["mlp.experts.2.w1"].normalized(), expected, atol=1e-5)
    assert torch.allclose(moments["mlp.experts.3.w3"].normalized(), prior, atol=1e-5)
    assert moments["mlp.experts.2.w1"].tokens == 5  # the count stays what it was
    assert torch.equal(
        moments["mlp.experts.0.w1"].upper, inputs["mlp.experts.0.w1"].t() @ inputs["mlp.experts.0.w1"]
    )
    assert moments["attn.q"].borrowed == 0


def test_where_no_expert_was_reached_nothing_is_borrowed() -> None:
    groups = [("experts.0.up",), ("experts.1.up",)]
    moments = {group[0]: SecondMoment.zeros(4, torch.device("cpu")) for group in groups}
    assert fill_up_rare_experts(moments, groups) == {}
    assert all(moment.borrowed == 0 for moment in moments.values())
