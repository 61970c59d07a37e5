"""Which folds a block has: proposed by shape and by who is given which tensor, kept if proven.

A norm's consumers are the linears whose input is its output, the very same tensor; where others take it too (a
router, experts that get some of its rows), everything below the modules that are given it. A linear's input may come
from the rows of a linear beside it that ran before it. There is no table of models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from woq.blocks import Linear, weight_of
from woq.errors import ConfigError
from woq.folds.fold import Fold, Folds, Form
from woq.folds.proof import Bench, in_float32, key
from woq.replay import BlockInputs

_TRIED = 3  # producers tried for a linear, the latest first: v before k before q, up before gate
_NORM_FORMS: tuple[Form, ...] = ("norm", "offset norm")


class FoldFinder:
    """Finds the folds of block after block. What held in one is tried first, all at once, on the next of its make."""

    def __init__(self, given: Mapping[str, Sequence[str]]) -> None:
        """given: producer -> consumers, by name inside a block, instead of what is proposed by shape; or empty."""
        self.given = given
        self._known: dict[object, Folds] = {}

    def find(self, block: nn.Module, names: Sequence[str], inputs: BlockInputs) -> Folds:
        """The folds in front of the linears `names`. The block is left as it was, to the bit.

        Raises ConfigError where a given producer has no such consumers in this block.
        """
        make = tuple(
            (name, type(m), *(p.shape for p in m.parameters(recurse=False)))
            for name, m in block.named_modules()
        )
        with torch.no_grad(), in_float32(block):
            bench = Bench(block, inputs)
            known = self._known.get((make, tuple(names)))
            if known is not None and _still_holds(known, bench):
                return known
            search = _Search(bench, names)
            found = search.given(self.given) if self.given else search.by_shape()
            if bench.trace.given.keys() >= set(names):  # else its refusals are of this block's data
                self._known[make, tuple(names)] = found
        return found


def _still_holds(known: Folds, bench: Bench) -> bool:
    reached = all(name in bench.trace.given for fold in known.kept for name in fold.consumers)
    return reached and (not known.kept or bench.proves(known.kept))


class _Search:
    """One block's."""

    def __init__(self, bench: Bench, names: Sequence[str]) -> None:
        self.bench, self.names, self.trace = bench, set(names), bench.trace
        self.kept: list[Fold] = []
        self.refused: dict[str, str] = {}

    def result(self) -> Folds:
        folded = {name for fold in self.kept for name in fold.consumers}
        return Folds(tuple(self.kept), {n: why for n, why in self.refused.items() if n not in folded})

    def by_shape(self) -> Folds:
        norms = self._norms()
        for consumers in self._same_input():
            if self.names.isdisjoint(consumers):
                continue
            tensor = self.trace.given[consumers[0]]
            norm = norms.get(key(tensor))
            reason = self._rows(consumers) if norm is None else self._norm(norm, consumers, ())
            if reason is not None:
                is_input = key(tensor) == key(self.trace.given[""])
                why = (
                    "it takes the block's input, which nothing inside the block makes" if is_input else reason
                )
                self.refused.update(dict.fromkeys(consumers, why))
        for tensor_key, norm in norms.items():
            if all(fold.producer != norm for fold in self.kept):
                self._everything_behind(norm, tensor_key)
        unseen = self.names - self.trace.given.keys()
        self.refused.update(
            dict.fromkeys(unseen, "no token of the sample that folds are proven on reached it")
        )
        return self.result()

    # --- proposals ------------------------------------------------------------------------------------------------

    def _same_input(self) -> list[list[str]]:
        """Linears that are given one tensor, by the order in which they ran."""
        groups: dict[tuple[int, int], list[str]] = {}
        for name in self.trace.order:
            groups.setdefault(key(self.trace.given[name]), []).append(name)
        return list(groups.values())

    def _norms(self) -> dict[tuple[int, int], str]:
        """What modules with a vector for a weight returned -> their name."""
        found = {}
        for name, output in self.trace.returned.items():
            weight = self.bench.modules[name]._parameters.get("weight")
            if weight is not None and weight.dim() == 1 and output.shape[-1] == weight.numel():
                found[key(output)] = name
        return found

    def _norm(self, norm: str, consumers: Sequence[str], parameters: Sequence[str]) -> str | None:
        """Keep the fold of a norm, or say why not."""
        features = self.bench.modules[norm].get_parameter("weight").numel()
        source = torch.arange(features, device=self.bench.inputs.device)
        for form in _NORM_FORMS:
            fold = Fold(norm, form, tuple(consumers), tuple(parameters), 0, features, source)
            if self._keep(fold):
                return None
        return f"scaling it and {norm} changes the block's output"

    def _everything_behind(self, norm: str, output: tuple[int, int]) -> None:
        """Propose all matrices that could take the norm's output below the modules that are given it."""
        modules = self.bench.modules
        width = modules[norm].get_parameter("weight").numel()
        taking = [n for n, t in self.trace.given.items() if key(t) == output]
        folded = {name for fold in self.kept for name in fold.consumers}
        consumers, parameters = list[str](), list[str]()
        for top in taking:
            for name, module in modules[top].named_modules(prefix=top):
                if isinstance(module, Linear):
                    if weight_of(module).shape[1] == width and name not in folded:
                        consumers.append(name)
                    continue
                parameters += [
                    f"{name}.{own}"
                    for own, p in module.named_parameters(recurse=False)
                    if p.dim() >= 2 and p.shape[-1] == width
                ]
        consumers, parameters = list(dict.fromkeys(consumers)), list(dict.fromkeys(parameters))
        if self.names.isdisjoint(consumers):
            return
        unseen = [name for name in consumers if name not in self.trace.given]
        if unseen:
            reason: str | None = f"{norm} also feeds {unseen[0]}, which no token of the sample reached"
        else:
            reason = self._norm(norm, consumers, parameters)
        if reason is not None:
            self.refused.update(dict.fromkeys(consumers, reason))

    def _rows(self, consumers: Sequence[str]) -> str | None:
        """Keep a fold from the rows of a linear beside the consumers, or say why not."""
        first = consumers[0]
        beside = first.rpartition(".")[0]
        before = self.trace.order[: self.trace.order.index(first)]
        candidates = [n for n in reversed(before) if n.rpartition(".")[0] == beside][:_TRIED]
        for producer in candidates:
            if self._rows_of(producer, consumers):
                return None
        tried = ", ".join(name.rpartition(".")[2] for name in candidates)
        return (
            f"no row of {tried} scales it"
            if tried
            else "no norm with a weight and no linear beside it makes it"
        )

    def _rows_of(self, producer: str, consumers: Sequence[str]) -> bool:
        linear = self.bench.linears
        rows, features = len(weight_of(linear[producer])), weight_of(linear[consumers[0]]).shape[1]
        for start, channels in _parts(rows, features):
            source = self.bench.source(producer, start, channels, consumers[0])
            if source is not None:
                fold = Fold(producer, "rows", tuple(consumers), (), start, channels, source)
                if self._keep(fold):
                    return True
        return False

    def _keep(self, fold: Fold) -> bool:
        proven = self.bench.proves([fold])
        if proven:
            self.kept.append(fold)
        return proven

    # --- a given table --------------------------------------------------------------------------------------------

    def given(self, table: Mapping[str, Sequence[str]]) -> Folds:
        for producer, consumers in table.items():
            named, parameters = self._named(producer, consumers)
            if not named and not parameters:
                continue
            if isinstance(self.bench.modules[producer], Linear):
                reason = None if self._rows_of(producer, named) else f"no row of {producer} scales it"
            else:
                reason = self._norm(producer, named, parameters)
            if reason is not None:
                self.refused.update(dict.fromkeys(named, reason))
        folded = {name for fold in self.kept for name in fold.consumers}
        rest = self.names - folded - self.refused.keys()
        self.refused.update(dict.fromkeys(rest, "absorb_layer_dict names no producer for it"))
        return self.result()

    def _named(self, producer: str, consumers: Sequence[str]) -> tuple[list[str], list[str]]:
        """The linears and the parameters among `consumers`; both empty where this block has none of the names."""
        there = dict(self.bench.block.named_parameters())
        named = [name for name in consumers if name in self.trace.given and name in self.bench.linears]
        parameters = [name for name in consumers if name in there]
        missing = [name for name in consumers if name not in (*named, *parameters)]
        known = producer in self.bench.modules
        if (known and missing) or (not known and (named or parameters)):
            wrong = missing[0] if known else producer
            raise ConfigError(
                f"absorb_layer_dict: {producer!r} -> {list(consumers)}, but the block has no {wrong!r} that ran",
                hint=f"names inside a block: {sorted(self.trace.given)}",
            )
        return named, parameters


def _parts(rows: int, features: int) -> Iterator[tuple[int, int]]:
    """(first row, how many): parts of a linear's rows that may feed so many features.

    All, where each feeds as many heads; of fused projections the last as many (up of gate/up, v of q/k/v), the
    latter half of what exceeds the features (v of q/k/v with grouped heads), the first as many.
    """
    if rows <= features:
        if features % rows == 0:
            yield 0, rows
        return
    yield rows - features, features
    grouped = (rows - features) // 2
    if grouped and grouped != features and features % grouped == 0:
        yield rows - grouped, grouped
    yield 0, features
