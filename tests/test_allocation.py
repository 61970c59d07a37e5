"""The knapsack against trying everything, and its promise: never over the budget."""

from __future__ import annotations

import itertools

import pytest
import torch

from woq.allocation import SLOTS, Unit, allocate
from woq.errors import ConfigError

WIDTHS = (2, 3, 4, 8)


def random_units(count: int, unit: int, rng: torch.Generator) -> list[Unit]:
    units = []
    for i in range(count):
        weights = int(torch.randint(1, 9, (1,), generator=rng)) * unit
        worst = float(torch.rand(1, generator=rng))
        noise = torch.rand(len(WIDTHS), generator=rng).tolist()
        errors = {b: worst * weights * 4.0**-b * (0.5 + x) for b, x in zip(WIDTHS, noise, strict=True)}
        units.append(Unit((f"u{i}",), weights, errors))
    return units


def size(units: list[Unit], chosen: list[int]) -> int:
    return sum(u.weights * b for u, b in zip(units, chosen, strict=True))


def cost(units: list[Unit], chosen: list[int]) -> float:
    return sum(u.errors[b] for u, b in zip(units, chosen, strict=True))


@pytest.mark.parametrize("average", [2.0, 2.3, 3.0, 3.5, 4.7, 8.0])
def test_it_is_the_best_of_all(average: float, rng: torch.Generator) -> None:
    for _ in range(5):
        units = random_units(5, 64, rng)
        budget = average * sum(u.weights for u in units)
        every = [c for c in itertools.product(WIDTHS, repeat=5) if size(units, list(c)) <= budget]
        best = min(cost(units, list(c)) for c in every)
        chosen = allocate(units, average)
        assert size(units, chosen) <= budget
        assert cost(units, chosen) == pytest.approx(best)


@pytest.mark.parametrize("average", [2.0, 2.05, 3.5, 7.99])
def test_large_sizes_are_rounded_within_the_budget(average: float, rng: torch.Generator) -> None:
    """Sizes that share no divisor: the table counts in slots, and nothing goes over for it."""
    units = random_units(60, 7_654_321, rng)
    units = [Unit(u.names, u.weights + i, u.errors) for i, u in enumerate(units)]
    total = sum(u.weights for u in units)
    assert total > SLOTS
    chosen = allocate(units, average)
    assert size(units, chosen) <= average * total
    assert size(units, chosen) > 0.99 * average * total - max(u.weights for u in units)
    for shift in (-1, 1):  # no swap of two neighbours' widths, no step down or up, is better and still fits
        for i in range(len(units)):
            other = WIDTHS[(WIDTHS.index(chosen[i]) + shift) % 4]
            changed = [*chosen[:i], other, *chosen[i + 1 :]]
            if size(units, changed) <= average * total:
                assert cost(units, changed) >= cost(units, chosen)


def test_fixed_widths_are_kept_and_impossible_budgets_refused() -> None:
    units = [Unit(("a",), 100, {8: 0.0}), Unit(("b",), 300, {2: 1.0, 4: 0.1})]
    assert allocate(units, 3.5) == [8, 2]
    assert allocate(units, 5.0) == [8, 4]
    with pytest.raises(ConfigError, match=r"average of 3\.4 bits cannot be reached: .* come to 3\.500"):
        allocate(units, 3.4)
