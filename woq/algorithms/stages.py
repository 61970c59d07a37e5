"""Which linears of a block are looked at together: by what the config asks for, and by what memory allows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from woq.configs import CalibratedConfig
from woq.moe import expert_kind
from woq.weights import WeightSpec

# Linears that share an input.
Group = tuple[str, ...]

# Bytes of float32 second moments held at a time; more of them cost another run of the block.
MOMENT_BYTES = 4 << 30


def stages(config: CalibratedConfig, groups: Sequence[Group]) -> list[list[Group]]:
    """Groups that are calibrated together: all, or one after the other, or as the config lists.

    The same linear of all experts counts as one group's turn: no expert feeds another, and those that few tokens reach
    borrow from the others. What a list leaves out comes last: the output head goes by no name inside a block.
    """
    listed = config.modules_in_block_to_quantize
    if listed is None and not config.true_sequential:
        return [list(groups)]
    if listed is None:
        turns: dict[str, list[Group]] = {}
        for group in groups:
            turns.setdefault(expert_kind(group[0]), []).append(group)
        return list(turns.values())
    unlisted = tuple(n for group in groups for n in group if not any(n in names for names in listed))
    kept = [[tuple(n for n in group if n in names) for group in groups] for names in (*listed, unlisted)]
    return [stage for parts in kept if (stage := [part for part in parts if part])]


def within_budget(parts: Iterable[Sequence[Group]], specs: Mapping[str, WeightSpec]) -> list[list[Group]]:
    """Runs of groups whose second moments fit `MOMENT_BYTES` together; the groups of one part stay in one run.

    A block of many experts has too many for one.
    """
    runs: list[list[Group]] = [[]]
    size = 0
    for part in parts:
        needed = sum(4 * specs[group[0]].in_features ** 2 for group in part)
        if runs[-1] and size + needed > MOMENT_BYTES:
            runs.append([])
            size = 0
        runs[-1] += part
        size += needed
    return runs
