"""A block on one calibration sample, in float32, to try rescalings on: who takes what, what follows what, what is exact.

A rescaling is proven by running the block: both sides are scaled at random, and nothing may change, while scaling the
producer alone must. Which row of a linear feeds which input feature of another is read off the block itself: rows are
scaled by known factors, and each feature must come out scaled by one of them. That finds grouped-query heads and fused
q/k/v or gate/up without knowing them, and refuses what is not linear on the way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from woq.blocks import Linear, linears
from woq.folds.fold import Fold, parameters, unique
from woq.moe import UnfusedExperts
from woq.replay import BlockCall, BlockInputs, run_batch, select

_SPREAD = 2.0  # trial scales lie in 1/2 .. 2
_UNCHANGED = 1e-3  # of the change that scaling the producer alone makes; float32 leaves about 1e-5
_VISIBLE = 1e-5  # of the output: a producer that changes less is not seen, so nothing can be proven of it


class _Reached(Exception):
    """A probed linear was given its input: the rest of the block need not run."""


@dataclass
class Trace:
    """What one run showed: linears in the order they ran, and the tensors that modules were given and returned."""

    order: list[str] = field(default_factory=list)
    given: dict[str, Tensor] = field(default_factory=dict)
    returned: dict[str, Tensor] = field(default_factory=dict)


class Bench:
    """A block in float32 on the first calibration sample, to try things on. Nothing done on it outlasts it."""

    def __init__(self, block: nn.Module, inputs: BlockInputs) -> None:
        self.modules = dict(block.named_modules())
        has_experts = any(isinstance(m, UnfusedExperts) for m in self.modules.values())
        self.block, self.inputs = block, _sample(inputs, whole=has_experts)
        self.linears = linears(block)
        self.trace = self._trace()
        self.plain = self._output()
        self.random = torch.Generator().manual_seed(0)

    def _output(self) -> Tensor:
        """[tokens, H], tokens that count."""
        output, mask = run_batch(self.block, self.inputs, 0), self.inputs.masks[0]
        return output.flatten(0, -2) if mask is None else output[mask.to(output.device)]

    def _trace(self) -> Trace:
        trace, handles = Trace(), []

        def watch(name: str, module: nn.Module) -> None:
            def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                given = _tensor_in((*args, *kwargs.values()))
                if given is not None and name not in trace.given:
                    trace.given[name] = given
                    if isinstance(module, Linear):
                        trace.order.append(name)
                returned = _tensor_in(output if isinstance(output, tuple) else (output,))
                if returned is not None:
                    trace.returned[name] = returned

            handles.append(module.register_forward_hook(hook, with_kwargs=True))

        for name, module in self.modules.items():
            watch(name, module)
        try:
            run_batch(self.block, self.inputs, 0)
        finally:
            for handle in handles:
                handle.remove()
        return trace

    def input_of(self, linear: str) -> Tensor:
        """[tokens, K]."""
        seen: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0].reshape(-1, args[0].shape[-1]).clone())
            raise _Reached

        handle = self.linears[linear].register_forward_pre_hook(hook)
        try:
            run_batch(self.block, self.inputs, 0)
        except _Reached:
            pass
        finally:
            handle.remove()
        return seen[0]

    @contextmanager
    def undoing(self, folds: Sequence[Fold]) -> Iterator[None]:
        """Whatever is done to the folds' tensors is undone on leaving."""
        touched: list[Tensor] = []
        for fold in folds:
            touched += self.modules[fold.producer].parameters(recurse=False)
            touched += [self.linears[name].weight for name in fold.consumers]
            touched += parameters(self.block, fold.parameters)
        saved = [(tensor, tensor.detach().clone()) for tensor in unique(touched)]
        try:
            yield
        finally:
            for tensor, value in saved:
                tensor.data.copy_(value)

    def scales(self, channels: int) -> Tensor:
        """Random, 1/2 .. 2."""
        exponents = torch.rand(channels, generator=self.random) * 2 - 1
        return (_SPREAD**exponents).to(self.inputs.device)

    def proves(self, folds: Sequence[Fold]) -> bool:
        """Whether all folds together leave the block's output unchanged, and their producers alone do not."""
        scales = [self.scales(fold.channels) for fold in folds]
        with self.undoing(folds):
            for fold, s in zip(folds, scales, strict=True):
                fold.divide(self.block, s)
            alone = self._difference()
        if alone <= _VISIBLE * _largest(self.plain):
            return False
        with self.undoing(folds):
            for fold, s in zip(folds, scales, strict=True):
                fold.apply(self.block, s)
            return self._difference() <= _UNCHANGED * alone

    def _difference(self) -> float:
        return _largest(self._output() - self.plain)

    def source(self, producer: str, start: int, channels: int, consumer: str) -> Tensor | None:
        """int64 [K]: which of the producer's rows each input feature of `consumer` is proportional to.

        A row's number is written in two digits, each digit a factor, and read off the features in two runs. None
        where a feature follows no single row. Features silent in this sample are taken to follow the common order.
        """
        plain, base = self.input_of(consumer), math.isqrt(channels - 1) + 1
        number = torch.arange(channels, device=plain.device)
        levels = _SPREAD ** torch.linspace(-1, 1, max(base, 2), device=plain.device)
        fold = Fold(producer, "rows", (), (), start, channels, number)
        digits = []
        for digit in (number // base, number % base):
            with self.undoing([fold]):
                fold.divide(self.block, levels[digit])
                digits.append(_digit(plain, self.input_of(consumer), levels))
        if any(d is None for d in digits):
            return None
        high, low = (d for d in digits if d is not None)
        silent = (plain == 0).all(0)
        found = torch.where(silent, -1, high * base + low)
        in_order = torch.arange(len(found), device=plain.device)
        if silent.any() and len(found) == channels and (found == in_order)[~silent].all():
            found = in_order
        return found if bool(((found >= 0) & (found < channels)).all()) else None


def _digit(plain: Tensor, scaled: Tensor, levels: Tensor) -> Tensor | None:
    """int64 [K]: the level that divided each feature; None where one is not divided by any."""
    power = plain.square().sum(0)
    ratio = (scaled * plain).sum(0) / power.clamp(min=1e-30)
    off = (scaled - ratio * plain).norm(dim=0) > 1e-3 * scaled.norm(dim=0)
    distance = (ratio.clamp(min=1e-6).log().unsqueeze(-1) + levels.log()).abs()
    nearest = distance.min(-1)
    far = nearest.values > 0.25 * (levels[1] / levels[0]).log()
    return None if bool(((off | far) & (power > 0)).any()) else nearest.indices


def _largest(x: Tensor) -> float:
    """The largest norm of a token."""
    return float(x.norm(dim=-1).max())


def _tensor_in(values: Iterable[Any]) -> Tensor | None:
    return next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)


def key(tensor: Tensor) -> tuple[int, int]:
    """The same for one tensor under several shapes. Valid as long as the tensors compared are all held."""
    return tensor.data_ptr(), tensor.numel()


def _in_float32(value: Any) -> Any:
    """A block's arguments with every float tensor in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_in_float32(v) for v in value)
    return {k: _in_float32(v) for k, v in value.items()} if isinstance(value, dict) else value


def _sample(inputs: BlockInputs, whole: bool) -> BlockInputs:
    """The first sample, or the `whole` first batch, in float32 on the block's device."""
    part = select(inputs, 0, range(len(inputs.hidden[0])) if whole else [0])
    call = part.calls[0]
    floats = BlockCall(_in_float32(call.args), _in_float32(call.kwargs), call.hidden_by_keyword)
    return BlockInputs(part.device, [part.hidden[0].to(part.device, torch.float32)], [floats], part.masks)


@contextmanager
def in_float32(block: nn.Module) -> Iterator[None]:
    """Parameters and buffers are float32 copies within, computed on in full float32; the own ones are back after."""
    precision = torch.get_float32_matmul_precision()
    kept = [(t, t.data) for t in (*block.parameters(), *block.buffers()) if t.is_floating_point()]
    torch.set_float32_matmul_precision("highest")
    try:
        for tensor, own in kept:
            tensor.data = own.to(torch.float32, copy=True)
        yield
    finally:
        for tensor, own in kept:
            tensor.data = own
        torch.set_float32_matmul_precision(precision)
