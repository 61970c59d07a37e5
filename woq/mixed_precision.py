"""bits="auto:3.5": measure every unit of the float model, allocate widths, and write them down as rules of the config.

The result is an ordinary config with one width a layer, so every algorithm, the folder's metadata and resuming need to know
nothing of how it was found. Sensitivities are those of rounding to nearest: an algorithm errs less, and much the same
less everywhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from woq.allocation import Unit, allocate
from woq.blocks import borrowed
from woq.configs import Override, QuantConfig
from woq.moe import expert_kind
from woq.plan import Choice, Plan
from woq.progress import Progress
from woq.replay import BlockCall, BlockInputs
from woq.sensitivity import block_units

TOKENS = 4096  # to measure on: whole batches, as many as it takes


def choose_bits(
    config: QuantConfig,
    plan: Plan,
    blocks: Sequence[tuple[str, nn.Module]],
    inputs: BlockInputs,
    calls: Sequence[Sequence[BlockCall]],
    progress: Progress,
) -> tuple[QuantConfig, Choice]:
    """`config` with a width for every layer, none of them automatic.

    plan: made with the widest choice. blocks: with their names. inputs: of the first block; calls: arguments of
    every block. Raises ConfigError where the budget cannot be met.
    """
    assert config.average_bits is not None
    count, tokens = 0, 0
    while count < len(inputs.hidden) and tokens < TOKENS:
        tokens += inputs.hidden[count].shape[0] * inputs.hidden[count].shape[1]
        count += 1
    at = BlockInputs(inputs.device, inputs.hidden[:count], [], inputs.masks[:count])
    progress.stage("measuring what each width costs", len(blocks))
    units: list[Unit] = []
    labels: list[str] = []
    for (name, block), block_calls in zip(blocks, calls, strict=True):
        specs = plan.of_block(name)
        at.calls = list(block_calls[:count])
        with borrowed(block, inputs.device):
            widths = {own: _allowed(config, f"{name}.{own}") for own in specs}
            found, at.hidden = block_units(block, specs, widths, at)
        for unit in found:
            units.append(replace(unit, names=tuple(f"{name}.{own}" for own in unit.names)))
            label = f"{name}: {' '.join(dict.fromkeys(map(expert_kind, unit.names)))}"
            labels.append(f"{name}: {' '.join(unit.names)}" if label in labels else label)
        progress.step(name)
    chosen = allocate(units, config.average_bits)
    bits = sum(unit.weights * width for unit, width in zip(units, chosen, strict=True))
    average = round(bits / sum(unit.weights for unit in units), 4)
    widths_of = {name: width for unit, width in zip(units, chosen, strict=True) for name in unit.names}
    choice = Choice(config.average_bits, average, dict(zip(labels, chosen, strict=True)))
    return _with_widths(config, plan, [name for name, _ in blocks], widths_of), choice


def _allowed(config: QuantConfig, name: str) -> tuple[int, ...]:
    """The widths a linear may have: a rule that names one leaves no choice."""
    _, rule = config.override(name)
    return config.bit_choices if rule.bits is None else (rule.bits,)


def _with_widths(
    config: QuantConfig, plan: Plan, blocks: Sequence[str], widths: Mapping[str, int]
) -> QuantConfig:
    """The config with these widths as rules before its own; the head, where it is planned, has the widest."""
    default = Counter(widths.values()).most_common(1)[0][0]
    widths = {**dict.fromkeys(plan.specs, config.widest_bits), **widths}
    wanted: dict[str, tuple[str, int] | None] = {}
    for name in (*plan.specs, *plan.skipped):
        pattern, rule = config.override(name)
        settled = name not in plan.specs or rule.bits is not None or widths[name] == default
        wanted[name] = None if settled else (pattern, widths[name])
    alike: dict[str, list[str]] = {}
    for name in wanted:
        block = next((b for b in blocks if name.startswith(f"{b}.")), "")
        alike.setdefault(block + expert_kind(name.removeprefix(block)), []).append(name)
    names_of: dict[tuple[str, int], list[str]] = {}
    for kind, names in alike.items():
        if len({wanted[name] for name in names}) == 1:  # all experts the same: one pattern for them
            members = {re.escape(kind).replace(r"\*", r"\d+"): wanted[names[0]]}
        else:
            members = {re.escape(name): wanted[name] for name in names}
        for member, want in members.items():
            if want is not None:
                names_of.setdefault(want, []).append(member)
    rules = {}
    for (pattern, width), patterns in names_of.items():
        base = config.overrides[pattern].model_dump(exclude_none=True) if pattern else {}
        rules[f"(?:{'|'.join(patterns)})$"] = Override(**{**base, "bits": width})
    return config.model_copy(update={"bits": default, "overrides": {**rules, **config.overrides}})
