"""What each block is given: written down in one pass of the model that runs no block.

Each block's forward is replaced by one that only notes its arguments. So every block is replayed with ITS keyword
arguments (its mask, its position embeddings), at the cost of an embedding look-up. Peers replay all blocks with block
0's arguments, which is silently wrong for alternating attention. What this assumes - hidden states pass from block to
block untouched, arguments do not depend on them - is proven once on real data by `verify_replay` before anything is
quantized.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from woq.calibration import Batch
from woq.errors import CalibrationError, QuantizationError
from woq.replay import BlockCall, BlockInputs, first_tensor

Forward = Callable[..., Any]


@dataclass
class Capture:
    """The inputs of the first block, the arguments of every block, and the form of what blocks return."""

    hidden: list[Tensor]
    calls: list[list[BlockCall]]  # [block][batch]
    tail: tuple[Any, ...] | None = (
        None  # what a block returns after the hidden states; None: it returns no tuple
    )

    def output(self, hidden: Tensor) -> Any:
        """`hidden` as a block would return it."""
        return hidden if self.tail is None else (hidden, *self.tail)


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    if args:
        return args[0], BlockCall(args[1:], dict(kwargs))
    rest = dict(kwargs)
    return rest.pop("hidden_states"), BlockCall((), rest, hidden_by_keyword=True)


@contextmanager
def _forwards_replaced(blocks: nn.ModuleList, make: Callable[[int, Forward], Forward]) -> Iterator[None]:
    """Within the context block i computes `make(i, its own forward)`; `__call__`, hooks and attributes stay."""
    shadowed = [block.__dict__.get("forward") for block in blocks]  # accelerate may have put one there
    for i, block in enumerate(blocks):
        block.__dict__["forward"] = make(i, block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, shadowed, strict=True):
            del block.__dict__["forward"]
            if forward is not None:
                block.__dict__["forward"] = forward


class _SeenAll(Exception):
    """What a forward pass was started for is written down: the rest, logits of every token above all, is not run."""


def _model_inputs(batch: Batch, device: torch.device) -> dict[str, Any]:
    mask = None if batch.attention_mask is None else batch.attention_mask.to(device)
    return {"input_ids": batch.input_ids.to(device), "attention_mask": mask, "use_cache": False}


@torch.no_grad()
def capture(
    model: nn.Module, blocks: nn.ModuleList, batches: Sequence[Batch], device: torch.device
) -> Capture:
    """Run everything but the blocks on every batch, and write down what each block is given.

    Block 0 must hold its weights: it runs once, to see whether blocks return a tensor or a tuple.
    Raises CalibrationError where the first hidden states are not finite.
    """
    found = Capture(hidden=[], calls=[[] for _ in blocks])

    def make(i: int, own_forward: Forward) -> Forward:
        def record(*args: Any, **kwargs: Any) -> Any:
            hidden, call = _split(args, kwargs)
            if i == 0:
                found.hidden.append(hidden.detach().clone())  # before a block could work on it in place
                if len(found.hidden) == 1:
                    output = own_forward(*args, **kwargs)
                    found.tail = tuple(output[1:]) if isinstance(output, tuple) else None
            found.calls[i].append(call)
            if i == len(blocks) - 1:
                raise _SeenAll
            return found.output(hidden)

        return record

    with _forwards_replaced(blocks, make):
        for batch in batches:
            with suppress(_SeenAll):
                model(**_model_inputs(batch, device))
    _share_equal_arguments(found.calls)
    for i, value in enumerate(found.hidden):
        if not torch.isfinite(value).all():
            raise CalibrationError(
                f"calibration batch {i}: the embeddings are not finite",
                hint="look for NaN or infinity in the checkpoint's embedding weights",
            )
    return found


def _share_equal_arguments(calls: list[list[BlockCall]]) -> None:
    """Keep one copy of arguments that equal the previous batch's: masks of [L, L] add up otherwise."""
    for per_block in calls:
        for before, call in itertools.pairwise(per_block):
            for name, value in call.kwargs.items():
                earlier = before.kwargs.get(name)
                if value is not earlier and earlier is not None and _same(value, earlier):
                    call.kwargs[name] = earlier


def _same(a: Any, b: Any) -> bool:
    """Whether two recorded arguments are equal: tensors by value, containers entry by entry, others by `==`."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and (a is b or (isinstance(a, str | int | float | bool) and a == b))


@torch.no_grad()
def verify_replay(
    model: nn.Module, blocks: nn.ModuleList, batch: Batch, found: Capture, device: torch.device
) -> None:
    """Prove on one sample that blocks chained by hand see what the model itself would give them.

    Runs the unmodified model once and compares, block by block: the hidden states are the previous block's output,
    and the arguments equal the captured ones. `found` must come from a `capture` of this very batch alone.
    Raises QuantizationError naming block and argument where they differ.
    """
    output: list[Tensor] = []

    def make(i: int, own_forward: Forward) -> Forward:
        def check(*args: Any, **kwargs: Any) -> Any:
            hidden, call = _split(args, kwargs)
            if i and not torch.equal(hidden, output.pop()):
                raise _no_replay(f"the model changes the hidden states between blocks {i - 1} and {i}")
            captured = found.calls[i][0]
            if len(call.args) != len(captured.args) or call.kwargs.keys() != captured.kwargs.keys():
                raise _no_replay(f"block {i} is called with other arguments when it follows a real block")
            named = [(str(n), a, b) for n, (a, b) in enumerate(zip(call.args, captured.args, strict=True), 1)]
            named += [(name, value, captured.kwargs[name]) for name, value in call.kwargs.items()]
            for name, value, expected in named:
                if not _same(value, expected):
                    raise _no_replay(f"argument {name!r} of block {i} depends on the blocks before it")
            if i == len(blocks) - 1:
                raise _SeenAll
            with _brought_to(blocks[i], device):
                result = own_forward(*args, **kwargs)
            output.append(first_tensor(result).clone())
            return result

        return check

    with _forwards_replaced(blocks, make), suppress(_SeenAll):
        model(**_model_inputs(batch, device))


@contextmanager
def _brought_to(block: nn.Module, device: torch.device) -> Iterator[None]:
    """Have a block on `device` for a moment. One that accelerate keeps on disk brings itself."""
    home = next(block.parameters()).device
    if home.type == "meta" or home == device:
        yield
        return
    block.to(device)
    try:
        yield
    finally:
        block.to(home)


def _no_replay(what: str) -> QuantizationError:
    return QuantizationError(
        f"{what}, so replaying blocks one by one would calibrate on wrong activations",
        hint="RTN needs no calibration and works; or pass blocks='...' if another ModuleList holds the blocks",
    )


@torch.no_grad()
def head_inputs(
    model: nn.Module,
    blocks: nn.ModuleList,
    head: nn.Module,
    batches: Sequence[Batch],
    inputs: BlockInputs,
    found: Capture,
) -> BlockInputs:
    """What the output head is given, when the last block returns `inputs.hidden`: the model's final norm applied."""
    seen: list[Tensor] = []
    at = iter(inputs.hidden)

    def make(i: int, own_forward: Forward) -> Forward:  # noqa: ARG001
        def pass_on(*args: Any, **kwargs: Any) -> Any:
            hidden, _ = _split(args, kwargs)
            return found.output(next(at).to(inputs.device) if i == len(blocks) - 1 else hidden)

        return pass_on

    def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _SeenAll

    handle = head.register_forward_pre_hook(record)
    try:
        with _forwards_replaced(blocks, make):
            for batch in batches:
                with suppress(_SeenAll):
                    model(**_model_inputs(batch, inputs.device))
    finally:
        handle.remove()
    return BlockInputs(inputs.device, seen, [BlockCall((), {})] * len(seen), inputs.masks)
