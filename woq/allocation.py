"""Which unit gets how many bits: the least total error within a budget, by dynamic programming.

Choosing one width a unit so that sizes add up to no more than a budget is a knapsack; its table is filled unit by unit, for
every size in whole slots. Nothing here knows what an error is: `woq/sensitivity.py` measures it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from woq.errors import ConfigError

SLOTS = 20_000  # of the table; sizes are rounded up to slots, so that a budget is never exceeded


@dataclass(frozen=True)
class Unit:
    """Linears that get one width together. errors: width -> what choosing it costs; weights: how many there are."""

    names: tuple[str, ...]
    weights: int
    errors: Mapping[int, float]


def allocate(units: Sequence[Unit], average: float) -> list[int]:
    """The width of every unit: least sum of errors with at most `average` bits a weight.

    Raises ConfigError where the smallest widths take more.
    """
    budget = math.floor(average * sum(unit.weights for unit in units) + 1e-6)
    least = sum(unit.weights * min(unit.errors) for unit in units)
    if least > budget:
        smallest = least / sum(unit.weights for unit in units)
        raise ConfigError(
            f"an average of {average:g} bits cannot be reached: the smallest widths allowed come to {smallest:.3f}",
            hint="raise the budget, or allow smaller widths in bit_choices or overrides",
        )
    slot = max(1, math.gcd(*(unit.weights for unit in units), budget), math.ceil(budget / SLOTS))
    chosen = _fill(units, budget // slot, slot)
    if chosen is None:  # rounding up to slots left no room: the smallest widths fit exactly
        chosen = [min(unit.errors) for unit in units]
    return _spend(units, chosen, budget)


def _fill(units: Sequence[Unit], slots: int, slot: int) -> list[int] | None:
    """The best widths for sizes rounded up to slots; None where not even the smallest fit."""
    best = torch.zeros(slots + 1, dtype=torch.float64)
    taken: list[Tensor] = []
    for unit in units:
        widths = sorted(unit.errors)
        costs = torch.full((len(widths), slots + 1), math.inf, dtype=torch.float64)
        for row, width in enumerate(widths):
            size = -(-unit.weights * width // slot)
            if size <= slots:
                costs[row, size:] = best[: slots + 1 - size] + unit.errors[width]
        best, choice = costs.min(0)
        taken.append(choice)
    if not torch.isfinite(best[slots]):
        return None
    left, chosen = slots, []
    for unit, choice in zip(reversed(units), reversed(taken), strict=True):
        width = sorted(unit.errors)[int(choice[left])]
        left -= -(-unit.weights * width // slot)
        chosen.append(width)
    return chosen[::-1]


def _spend(units: Sequence[Unit], chosen: list[int], budget: int) -> list[int]:
    """Spend what rounding to slots left over, each time where a bit gains most."""
    left = budget - sum(unit.weights * width for unit, width in zip(units, chosen, strict=True))
    while True:
        gains = [
            ((unit.errors[now] - error) / (unit.weights * (width - now)), i, width)
            for i, (unit, now) in enumerate(zip(units, chosen, strict=True))
            for width, error in unit.errors.items()
            if width > now and unit.weights * (width - now) <= left and error < unit.errors[now]
        ]
        if not gains:
            return chosen
        _, i, width = max(gains)
        left -= units[i].weights * (width - chosen[i])
        chosen[i] = width
