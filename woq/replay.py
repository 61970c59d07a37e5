"""Running blocks one by one on what they are given, and watching what their linears see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from woq.blocks import linears
from woq.errors import CalibrationError
from woq.moe import UnfusedExperts
from woq.nested import mapped, tensors_in

T = TypeVar("T")


@dataclass(frozen=True)
class BlockCall:
    """The arguments of one block for one batch, the hidden states left out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_by_keyword: bool = False


@dataclass(frozen=True)
class Following:
    """The block after the one at hand, still in float and on the same device, and its arguments for every batch."""

    block: nn.Module
    calls: Sequence[BlockCall]


@dataclass
class BlockInputs:
    """What one block is run on: a list entry per calibration batch.

    device: where the block is and runs. hidden: [B, L, H] each, anywhere: what the quantized blocks before hand on.
    calls: the other arguments of THIS block. masks: bool [B, L], True where a token counts, or None where all do.
    float_hidden, float_outputs: what the float model gives this block and takes from it, [B, L, H] each; None unless
    the algorithm asked for them (`Algorithm.needs_float_stream`). outputs: [B, L, H] each, what the quantized block
    makes of `hidden`; set by an algorithm that has come to know it. following: the next block; None after the last one,
    and unless the algorithm asked for it (`Algorithm.needs_following`).
    """

    device: torch.device
    hidden: list[Tensor]
    calls: list[BlockCall]
    masks: list[Tensor | None]
    float_hidden: list[Tensor] | None = None
    float_outputs: list[Tensor] | None = None
    outputs: list[Tensor] | None = None
    following: Following | None = None

    def in_float(self) -> BlockInputs:
        """The same batches as the float model sees them; this very object where it does not tell."""
        if self.float_hidden is None:
            return self
        return replace(self, hidden=self.float_hidden, float_hidden=None, float_outputs=None, outputs=None)

    def batches(self, chosen: Sequence[int]) -> BlockInputs:
        """Some of the batches."""

        def of(values: list[T]) -> list[T]:
            return [values[i] for i in chosen]

        return BlockInputs(
            self.device,
            of(self.hidden),
            of(self.calls),
            of(self.masks),
            None if self.float_hidden is None else of(self.float_hidden),
            None if self.float_outputs is None else of(self.float_outputs),
        )


def call_block(block: nn.Module, hidden: Tensor, call: BlockCall) -> Any:
    """The block's raw output: a tensor, or a tuple whose first entry is one."""
    if call.hidden_by_keyword:
        return block(hidden_states=hidden, **call.kwargs)
    return block(hidden, *call.args, **call.kwargs)


def first_tensor(output: Any) -> Tensor:
    """A block's hidden states, whether it returns them bare or first in a tuple."""
    value = output[0] if isinstance(output, tuple) else output
    assert isinstance(value, Tensor)
    return value


def forward_batch(
    block: nn.Module, inputs: BlockInputs, i: int, call: Callable[..., Any] = call_block
) -> Tensor:
    """The block's output hidden states [B, L, H] for batch `i`, on `inputs.device`; padding is routed to no expert.

    `call(block, hidden, block_call)` runs it: `call_block`, or one that puts other weights in.
    """
    hidden, own, mask = inputs.hidden[i], inputs.calls[i], inputs.masks[i]
    here = mapped(own, lambda tensor: tensor.to(inputs.device))
    experts = [m for m in block.modules() if isinstance(m, UnfusedExperts)]
    for module in experts:
        module.token_mask = None if mask is None else mask.flatten()
    try:
        return first_tensor(call(block, hidden.to(inputs.device), here))
    finally:
        for module in experts:
            module.token_mask = None


@torch.no_grad()
def run_batch(block: nn.Module, inputs: BlockInputs, i: int) -> Tensor:
    """`forward_batch` without gradients. Raises CalibrationError naming the samples whose output is not finite."""
    output = forward_batch(block, inputs, i)
    check_finite({i: output}, inputs.masks)
    return output


@torch.no_grad()
def advance(block: nn.Module, inputs: BlockInputs, keep_on: torch.device) -> list[Tensor]:
    """The next block's hidden states. Raises as `run_batch` does."""
    outputs = [forward_batch(block, inputs, i).to(keep_on) for i in range(len(inputs.hidden))]
    check_finite(dict(enumerate(outputs)), inputs.masks)
    return outputs


def check_finite(outputs: Mapping[int, Tensor], masks: Sequence[Tensor | None]) -> None:
    """Raise CalibrationError naming batch and samples where an output [B, L, H] holds NaN or infinity outside padding.

    Batch by batch the device is only asked to look; the answers are waited for once, at the end.
    """
    if not outputs:
        return

    def samples(i: int, output: Tensor) -> Tensor:
        wrong = ~torch.isfinite(output.sum(-1, dtype=torch.float32))  # NaN and infinity survive summing
        mask = masks[i]
        return (wrong if mask is None else wrong & mask.to(output.device)).flatten(1).any(1)

    found = [samples(i, output) for i, output in outputs.items()]
    if not torch.cat(found).any():
        return
    i, bad = next((i, flags) for i, flags in zip(outputs, found, strict=True) if flags.any())
    raise CalibrationError(
        f"calibration batch {i}, samples {bad.nonzero().flatten().tolist()}: the block's output is not finite",
        hint="float16 overflows on models trained in bfloat16: pass dtype='bfloat16' or 'float32'",
    )


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


def counted_rows(name: str, x: Tensor, mask: Tensor | None) -> Tensor:
    """A linear's input as [tokens, K], rows that are only padding left out.

    Raises CalibrationError where rows cannot be matched with the mask [B, L].
    """
    x = x.reshape(-1, x.shape[-1])
    if mask is None:
        return x
    if mask.numel() != x.shape[0]:
        raise CalibrationError(
            f"layer {name!r} sees {x.shape[0]} rows where the batch has {mask.numel()} tokens, so padding "
            "cannot be told apart",
            hint="calibrate on packed text (padding=False, the default)",
        )
    return x[mask.flatten().to(x.device)]


class _SeenAll(Exception):
    """Raised to leave a block that has shown what it was run for."""


def observe(
    block: nn.Module,
    names: Sequence[str],
    inputs: BlockInputs,
    visit: Callable[[str, Tensor], None],
) -> None:
    """Run the block on every batch and call `visit(name, x)` with each named linear's input as [tokens, K].

    A run ends as soon as all of them have been given an input: what follows would be computed for nothing. Rows that are
    only padding are left out. Raises CalibrationError where rows cannot be matched with the mask.
    """
    modules = linears(block)
    current: list[Tensor | None] = [None]
    waiting: set[str] = set()

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        in_expert = inside_experts(block, name)

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            visit(name, counted_rows(name, args[0], None if in_expert else current[0]))
            waiting.discard(name)
            if not waiting:
                raise _SeenAll

        return hook

    handles = [modules[name].register_forward_pre_hook(watch(name)) for name in names]
    try:
        for i, mask in enumerate(inputs.masks):
            current[0] = mask
            waiting.update(names)
            with suppress(_SeenAll):
                run_batch(block, inputs, i)
    finally:
        for handle in handles:
            handle.remove()


def inside_experts(block: nn.Module, name: str) -> bool:
    """Experts drop padding themselves (see `UnfusedExperts`): their rows are tokens already."""
    parents = name.split(".")[:-1]
    return any(
        isinstance(block.get_submodule(".".join(parents[: i + 1])), UnfusedExperts)
        for i in range(len(parents))
    )


def select(inputs: BlockInputs, i: int, rows: Sequence[int]) -> BlockInputs:
    """Batch `i` alone, cut to the samples `rows`; the whole of it where an argument cannot be cut along samples."""
    hidden, call, mask = inputs.hidden[i], inputs.calls[i], inputs.masks[i]
    tensors = [t for t in tensors_in(call) if t.dim() > 1]
    chosen = list(rows)
    if len(chosen) == len(hidden) or any(t.shape[0] not in (1, len(hidden)) for t in tensors):
        return BlockInputs(inputs.device, [hidden], [call], [mask])

    one = mapped(call, lambda t: t[chosen] if t.dim() > 1 and t.shape[0] > 1 else t)
    return BlockInputs(inputs.device, [hidden[chosen]], [one], [None if mask is None else mask[chosen]])
