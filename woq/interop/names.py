"""Tensor names of a checkpoint, and of the module they belong to: transformers renames and fuses as it loads.

Since transformers 5 a block's experts are one parameter, and some modules have other names than their checkpoints: each
architecture's rules say how a name is changed, and which linears of an expert are concatenated into which. We load
quantized layers ourselves, so the same rules are applied here to whole layers. Read are renamings, and concatenation
along out_features; a name that no rule knows stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_WEIGHT = ".weight"
_LITERAL = re.compile(r"[\w.]*\*[\w.]*\.weight")  # a pattern with one star and nothing else of a regex
_FUSED = (["MergeModulelist", "Concatenate"], ["MergeModulelist"])  # all experts, and of each several linears


@dataclass(frozen=True)
class Fusion:
    """Linears of an expert that the module holds as one: "experts.*.w1", "experts.*.w3" -> "experts", "gate_up_proj"."""

    sources: tuple[str, ...]
    module: str
    projection: str

    def theirs(self, name: str) -> tuple[str, ...] | None:
        """The stored layers that make up our layer `name`, in order; None where this rule is not about it."""
        match = re.fullmatch(rf"(.*){re.escape(self.module)}\.(\d+)\.{re.escape(self.projection)}", name)
        if match is None:
            return None
        return tuple(match[1] + source.replace("*", match[2]) for source in self.sources)

    def ours(self, name: str) -> tuple[str, int] | None:
        """(our layer that the stored layer `name` is part of, its place in it); None as above."""
        for i, source in enumerate(self.sources):
            pattern = re.escape(source).replace(r"\*", r"(\d+)")
            match = re.fullmatch(f"(.*){pattern}", name)
            if match is not None:
                return f"{match[1]}{self.module}.{match[2]}.{self.projection}", i
        return None


class Naming:
    """The rules of one model."""

    def __init__(self, model: Any) -> None:
        """model: a transformers model, with weights or without."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        rules = get_model_conversion_mapping(model, add_legacy=False)
        self.renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
        self.backwards = [rule.reverse_transform() for rule in reversed(self.renamings)]
        self.fusions = [
            made for rule in rules if isinstance(rule, WeightConverter) if (made := _fusion(rule))
        ]

    def ours(self, name: str) -> tuple[str, int]:
        """(the model's layer that the stored layer `name` is, or is part of; its place in it)."""
        renamed = self.renamed(name + _WEIGHT).removesuffix(_WEIGHT)
        return next((found for fusion in self.fusions if (found := fusion.ours(renamed))), (renamed, 0))

    def our_tensor(self, name: str) -> tuple[str, int]:
        """The same for the stored tensor `name`."""
        if not name.endswith(_WEIGHT):
            return self.renamed(name), 0
        layer, place = self.ours(name.removesuffix(_WEIGHT))
        return layer + _WEIGHT, place

    def renamed(self, name: str) -> str:
        """What transformers calls the stored tensor `name` before anything is fused."""
        for rule in self.renamings:
            name = rule.rename_source_key(name)[0]
        return name

    def theirs(self, name: str) -> tuple[str, ...]:
        """The stored layers of the model's layer `name`, in the order in which they are concatenated."""
        parts = next((found for fusion in self.fusions if (found := fusion.theirs(name))), (name,))
        return tuple(self._back(part + _WEIGHT).removesuffix(_WEIGHT) for part in parts)

    def their_tensor(self, name: str) -> tuple[str, ...]:
        """The same for the model's tensor `name`."""
        if not name.endswith(_WEIGHT):
            return (self._back(name),)
        return tuple(part + _WEIGHT for part in self.theirs(name.removesuffix(_WEIGHT)))

    def _back(self, name: str) -> str:
        for rule in self.backwards:
            name = rule.rename_source_key(name)[0]
        return name


def gathered(places: Iterable[tuple[str, tuple[str, int]]]) -> dict[str, tuple[str, ...]]:
    """(stored name, (our name, place)) -> our name: the stored names that make it up, in order."""
    found: dict[str, dict[int, str]] = {}
    for stored, (ours, place) in places:
        found.setdefault(ours, {})[place] = stored
    return {ours: tuple(parts[place] for place in sorted(parts)) for ours, parts in found.items()}


def _fusion(rule: Any) -> Fusion | None:
    """A converter's rule where it stacks experts as they are, side by side or one by one; None for any other."""
    operations = [type(operation).__name__ for operation in rule.operations]
    sources, targets = list(rule.source_patterns), list(rule.target_patterns)
    if operations not in _FUSED or len(targets) != 1 or not all(map(_LITERAL.fullmatch, sources)):
        return None
    module, _, projection = targets[0].rpartition(".")
    return Fusion(tuple(source.removesuffix(_WEIGHT) for source in sources), module, projection)
