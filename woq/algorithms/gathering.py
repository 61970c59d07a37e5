"""Second moments of a block's linears, stage after stage, while the linears of the stages before become others.

Where each stage is one group of linears with one input, the block is run once: its passes wait in front of each group
(`woq/walk.py`). Else it is run anew for every stage, up to the linears that the stage is about. Both see the same
numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Protocol

from torch import Tensor, nn

from woq.algorithms.hessian import SecondMoment
from woq.algorithms.stages import Group
from woq.phases import phase
from woq.replay import BlockInputs, advance, inside_experts, observe
from woq.walk import Walk, can_walk
from woq.weights import WeightSpec


class Gathering(Protocol):
    """Where the moments of one block come from."""

    def moments(self, groups: Sequence[Group]) -> dict[str, SecondMoment]:
        """Of the groups' inputs, by the first linear of each, the block's weights being what they now are.

        Drift is included where the float model's hidden states are known, but not for experts: the two models route
        different tokens to them.
        """

    def finish(self) -> None:
        """Once all linears are rounded: put into the `BlockInputs` what the block's passes have come to."""


@contextmanager
def gathering(
    block: nn.Module,
    specs: Mapping[str, WeightSpec],
    in_turn: Sequence[Sequence[Group]],
    groups: Sequence[Group],
    inputs: BlockInputs,
    threads: ThreadPoolExecutor,
) -> Iterator[Gathering]:
    """The cheaper of the two ways that can be gone. `block` must still be the float one.

    threads: from `walk.walkers`, the same for all blocks. groups: all linears by their input, in the order they run; in_turn: those that are looked at together.
    """
    drifting = inputs.float_hidden is not None
    float_block = block
    if (
        drifting and len(in_turn) > 1
    ):  # what the float model has later, a block with rounded linears cannot tell
        float_block = copy.deepcopy(block)
    widest = max(spec.in_features for spec in specs.values())
    if can_walk(block, in_turn, groups, widest, inputs, 2 if drifting else 1):
        stops = [group[0] for group in groups]
        with ExitStack() as stack:
            floats = (
                stack.enter_context(Walk(float_block, inputs.in_float(), stops, threads))
                if drifting
                else None
            )
            yield _Walking(inputs, specs, stack.enter_context(Walk(block, inputs, stops, threads)), floats)
        return
    if drifting and inputs.float_outputs is None:
        inputs.float_outputs = advance(block, inputs.in_float(), inputs.hidden[0].device)
    yield _Rerunning(block, float_block, specs, inputs)


class _Walking:
    def __init__(
        self, inputs: BlockInputs, specs: Mapping[str, WeightSpec], walk: Walk, floats: Walk | None
    ) -> None:
        self.inputs, self.specs, self.walk, self.floats = inputs, specs, walk, floats

    def moments(self, groups: Sequence[Group]) -> dict[str, SecondMoment]:
        ((name, *_),) = groups
        moment = SecondMoment.zeros(self.specs[name].in_features, self.inputs.device, self.floats is not None)
        for i in range(len(self.inputs.hidden)):
            in_float = None if self.floats is None else self.floats.one_to(name, i)
            x = self.walk.one_to(name, i)
            if x is not None:
                with phase("statistics"):
                    moment.add(name, x, in_float)
        return {name: moment}

    def finish(self) -> None:
        if self.floats is not None and self.inputs.float_outputs is None:
            self.inputs.float_outputs = self.floats.finish()
        self.inputs.outputs = self.walk.finish()


class _Rerunning:
    def __init__(
        self, block: nn.Module, float_block: nn.Module, specs: Mapping[str, WeightSpec], inputs: BlockInputs
    ) -> None:
        self.block, self.float_block, self.specs, self.inputs = block, float_block, specs, inputs

    def moments(self, groups: Sequence[Group]) -> dict[str, SecondMoment]:
        inputs, device = self.inputs, self.inputs.device
        features = {group[0]: self.specs[group[0]].in_features for group in groups}
        drifting = [
            n for n in features if inputs.float_hidden is not None and not inside_experts(self.block, n)
        ]
        moments = {n: SecondMoment.zeros(k, device, n in drifting) for n, k in features.items()}
        floats = inputs.in_float()

        def add(name: str, x: Tensor) -> None:
            with phase("statistics"):
                moments[name].add(name, x, seen.get(name))

        for i in range(len(inputs.hidden)):
            seen: dict[str, Tensor] = {}
            if drifting:
                observe(self.float_block, drifting, floats.batches([i]), seen.__setitem__)
            observe(self.block, list(features), inputs.batches([i]), add)
        return moments

    def finish(self) -> None:
        pass  # what comes next is left to whoever runs the blocks
