"""How much each group of linears suffers from how many bits: measured block by block, on the float model.

A unit is what must have one width to be served: linears that share an input (q/k/v, gate/up), or all experts' linears of
one kind. Each unit by itself is rounded to nearest (with search) at each width, and its block is run: the error is the
mean over tokens of the squared change of the block's output, relative to that output. Errors of this kind add up, over units
and over blocks, as long as they are small, because a block adds to the hidden states what the next ones read normalised.

What it gives up: a change early in a model and one late in it count the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn

from woq.algorithms.base import float_weight
from woq.algorithms.rtn import round_to_nearest
from woq.allocation import Unit
from woq.blocks import Linear, linears, weight_of, write_back
from woq.moe import expert_kind
from woq.replay import BlockInputs, input_groups, run_batch
from woq.weights import WeightSpec

WIDEST_MEASURED = (
    4  # an error at more bits is a quarter a bit of that at 4: too small to measure, and never decisive
)


def block_units(
    block: nn.Module,
    specs: Mapping[str, WeightSpec],
    widths: Mapping[str, Sequence[int]],
    inputs: BlockInputs,
) -> tuple[list[Unit], list[Tensor]]:
    """The units of a float block with their errors, and the block's outputs.

    widths: linear -> the widths it may have; linears of a unit that may not have the same are units of their own.
    """
    found = linears(block)
    outputs = [run_batch(block, inputs, i) for i in range(len(inputs.hidden))]
    units = []
    for names in _together(block, list(specs), widths, inputs):
        allowed, own = widths[names[0]], {name: found[name] for name in names}
        measured = {}
        for width in sorted({min(width, WIDEST_MEASURED) for width in allowed}):
            with _rounded(own, specs, width):
                measured[width] = _change(block, inputs, outputs)
        errors = {w: measured[min(w, WIDEST_MEASURED)] / 4 ** max(w - WIDEST_MEASURED, 0) for w in allowed}
        units.append(Unit(tuple(names), sum(linear.weight.numel() for linear in own.values()), errors))
    return units, outputs


def _together(
    block: nn.Module, names: Sequence[str], widths: Mapping[str, Sequence[int]], inputs: BlockInputs
) -> list[list[str]]:
    """Linears that must have one width: shared input, or experts' linears of one kind; split where rules differ."""
    modules = dict(block.named_modules())
    watched = [name for name in names if name in modules]  # fused experts are no modules: nothing to watch
    groups = [*input_groups(block, watched, inputs), *((name,) for name in names if name not in modules)]
    # Experts' linears that share an input, in whichever expert that was seen: one that no token reached stands alone.
    leader = {
        expert_kind(name): expert_kind(group[0]) for group in groups if len(group) > 1 for name in group
    }
    units: dict[tuple[object, ...], list[str]] = {}
    for name in names:
        kind = expert_kind(name)
        units.setdefault((leader.get(kind, kind), *widths[name]), []).append(name)
    return list(units.values())


@contextmanager
def _rounded(own: Mapping[str, Linear], specs: Mapping[str, WeightSpec], bits: int) -> Iterator[None]:
    """Inside the context these linears hold weights of `bits` bits."""
    kept = {name: linear.weight.detach().clone() for name, linear in own.items()}
    for name, linear in own.items():
        weight = float_weight(name, weight_of(linear))
        write_back(linear, round_to_nearest(weight, replace(specs[name], bits=bits)).dequantize())
    try:
        yield
    finally:
        for name, linear in own.items():
            linear.weight.data.copy_(kept[name])


def _change(block: nn.Module, inputs: BlockInputs, before: Sequence[Tensor]) -> float:
    """Mean over tokens of ||output - before||^2 / ||before||^2."""
    total, tokens = 0.0, 0
    for i, old in enumerate(before):
        new, mask = run_batch(block, inputs, i), inputs.masks[i]
        change = (new.float() - old.float()).square().sum(-1) / old.float().square().sum(-1).clamp(min=1e-20)
        if mask is not None:
            change = change[mask.to(change.device)]
        total += float(change.sum())
        tokens += change.numel()
    return total / max(tokens, 1)
