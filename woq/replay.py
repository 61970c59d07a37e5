"""What each block is given, and running blocks one by one on it.

Inputs come from the model's own forward with each block's forward replaced by one that only writes down its arguments:
so every block is replayed with ITS keyword arguments (its mask, its position embeddings), at the cost of an embedding
look-up. Peers replay all blocks with block 0's arguments, which is silently wrong for alternating attention. What
this assumes - hidden states pass from block to block untouched, arguments do not depend on them - is proven once on
real data by `verify_replay` before anything is quantized.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from woq.blocks import linears
from woq.calibration import Batch
from woq.errors import CalibrationError, QuantizationError
from woq.moe import UnfusedExperts

Forward = Callable[..., Any]


@dataclass(frozen=True)
class BlockCall:
    """The arguments of one block for one batch, the hidden states left out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_by_keyword: bool = False


@dataclass
class BlockInputs:
    """What one block is run on: a list entry per calibration batch.

    device: where the block is and runs. hidden: [B, L, H] each, anywhere. calls: the other arguments of THIS block. masks: bool [B, L], True where a token counts,
    or None where all do.
    """

    device: torch.device
    hidden: list[Tensor]
    calls: list[BlockCall]
    masks: list[Tensor | None]


@dataclass
class Capture:
    """The inputs of the first block, the arguments of every block, and the form of what blocks return."""

    hidden: list[Tensor]
    calls: list[list[BlockCall]]  # [block][batch]
    tail: tuple[Any, ...] | None = (
        None  # what follows the hidden states in a block's output; None: nothing, no tuple
    )

    def output(self, hidden: Tensor) -> Any:
        """`hidden` as a block would return it."""
        return hidden if self.tail is None else (hidden, *self.tail)


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    if args:
        return args[0], BlockCall(args[1:], dict(kwargs))
    rest = dict(kwargs)
    return rest.pop("hidden_states"), BlockCall((), rest, hidden_by_keyword=True)


def call_block(block: nn.Module, hidden: Tensor, call: BlockCall) -> Any:
    """The block's raw output: a tensor, or a tuple whose first entry is one."""
    if call.hidden_by_keyword:
        return block(hidden_states=hidden, **call.kwargs)
    return block(hidden, *call.args, **call.kwargs)


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


def first_tensor(output: Any) -> Tensor:
    """A block's hidden states, whether it returns them bare or first in a tuple."""
    value = output[0] if isinstance(output, tuple) else output
    assert isinstance(value, Tensor)
    return value


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_to(v, device) for v in value)
    if isinstance(value, dict):
        return {name: _to(v, device) for name, v in value.items()}
    return value


@torch.no_grad()
def run_batch(block: nn.Module, inputs: BlockInputs, i: int) -> Tensor:
    """The block's output hidden states [B, L, H] for batch `i`, on `inputs.device`.

    Padding is routed to no expert meanwhile. Raises CalibrationError naming the samples whose output is not finite.
    """
    hidden, call, mask = inputs.hidden[i], inputs.calls[i], inputs.masks[i]
    here = BlockCall(_to(call.args, inputs.device), _to(call.kwargs, inputs.device), call.hidden_by_keyword)
    experts = [m for m in block.modules() if isinstance(m, UnfusedExperts)]
    for module in experts:
        module.token_mask = None if mask is None else mask.flatten()
    try:
        output = first_tensor(call_block(block, hidden.to(inputs.device), here))
    finally:
        for module in experts:
            module.token_mask = None
    counted = output if mask is None else output[mask.to(output.device)]
    if not torch.isfinite(counted).all():
        bad = (~torch.isfinite(output)).flatten(1).any(1).nonzero().flatten().tolist()
        raise CalibrationError(
            f"calibration batch {i}, samples {bad}: the block's output is not finite",
            hint="float16 overflows on models trained in bfloat16: pass dtype='bfloat16' or 'float32'",
        )
    return output


def advance(block: nn.Module, inputs: BlockInputs, keep_on: torch.device) -> list[Tensor]:
    """The next block's hidden states."""
    return [run_batch(block, inputs, i).to(keep_on) for i in range(len(inputs.hidden))]


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


def input_groups(block: nn.Module, names: Sequence[str], inputs: BlockInputs) -> list[tuple[str, ...]]:
    """Linears that are given the very same tensor, in the order they run; statistics are computed once a group.

    Runs as many batches as it takes to see every linear once (an expert may wait for its token); one that no batch
    reaches stands alone, at the end.
    """
    modules = linears(block)
    groups: list[list[str]] = []
    seen: set[str] = set()
    last: list[Tensor] = []  # holds the tensor, so that its identity cannot be reused

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if name in seen:
                return
            seen.add(name)
            if last and last[0] is args[0]:
                groups[-1].append(name)
            else:
                groups.append([name])
            last[:] = [args[0]]

        return hook

    handles = [modules[name].register_forward_pre_hook(watch(name)) for name in names]
    try:
        for i in range(len(inputs.hidden)):
            if len(seen) == len(names):
                break
            run_batch(block, inputs, i)
            last.clear()
    finally:
        for handle in handles:
            handle.remove()
    return [tuple(group) for group in groups] + [(name,) for name in names if name not in seen]


def observe(
    block: nn.Module,
    names: Sequence[str],
    inputs: BlockInputs,
    visit: Callable[[str, Tensor], None],
) -> None:
    """Run the block on every batch and call `visit(name, x)` with each named linear's input as [tokens, K].

    Rows that are only padding are left out. Raises CalibrationError where rows cannot be matched with the mask.
    """
    modules = linears(block)
    current: list[Tensor | None] = [None]

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        inside_experts = _inside_experts(block, name)

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            mask = current[0]
            if mask is not None and not inside_experts:
                if mask.numel() != x.shape[0]:
                    raise CalibrationError(
                        f"layer {name!r} sees {x.shape[0]} rows where the batch has {mask.numel()} tokens, so padding "
                        "cannot be told apart",
                        hint="calibrate on packed text (padding=False, the default)",
                    )
                x = x[mask.flatten().to(x.device)]
            visit(name, x)

        return hook

    handles = [modules[name].register_forward_pre_hook(watch(name)) for name in names]
    try:
        for i, mask in enumerate(inputs.masks):
            current[0] = mask
            run_batch(block, inputs, i)
    finally:
        for handle in handles:
            handle.remove()


def _inside_experts(block: nn.Module, name: str) -> bool:
    """Experts drop padding themselves (see `UnfusedExperts`): their rows are tokens already."""
    parents = name.split(".")[:-1]
    return any(
        isinstance(block.get_submodule(".".join(parents[: i + 1])), UnfusedExperts)
        for i in range(len(parents))
    )
