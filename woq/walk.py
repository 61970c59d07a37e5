"""A block's forward passes stopped in front of a linear, and gone on with once that linear's weight is another.

Rounding a block's linears one after the other needs, in front of each, what the ones before now make of the calibration
data. Running the block anew for every linear computes its first half again and again. Here each batch's forward pass
runs in a thread of its own that waits inside the linear's pre-hook, so that a block is run once, however many stops it
has. One thread runs at a time: threads are used for their stacks, not for speed. What a waiting pass holds stays in memory:
its residual and the input of the linear, for every batch.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor, nn

from woq.blocks import linears
from woq.moe import UnfusedExperts
from woq.replay import BlockInputs, check_finite, counted_rows, forward_batch

_THREADS = (
    2048  # waiting passes keep their own OpenMP teams: more than these and the block is run anew instead
)


class _Left(BaseException):
    """Raised inside a pass that nobody goes on with. No Exception: a model's own handlers must let it through."""


class _Pass:
    """One batch's forward pass."""

    def __init__(self, block: nn.Module, inputs: BlockInputs, i: int, threads: ThreadPoolExecutor) -> None:
        self.block, self.inputs, self.i, self.threads = block, inputs, i, threads
        self.at: Tensor | None = None  # the input it waits with
        self.output: Tensor | None = None
        self._error: BaseException | None = None
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._left = False
        on_device = inputs.device.type != "cpu"
        self._stream = torch.accelerator.current_stream(inputs.device) if on_device else None
        self._running: Future[None] | None = None

    def go_on(self) -> None:
        """Until it waits again (`at` is set) or ends (`output` is)."""
        self.at = None
        if self.output is not None:
            return
        if self._running is None:
            self._running = self.threads.submit(self._run)
        else:
            self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def wait_with(self, x: Tensor) -> None:
        """Called in the pass's own thread."""
        self.at = x
        self._back.release()
        self._go.acquire()
        if self._left:
            raise _Left

    def leave(self) -> None:
        """End the pass where it waits."""
        if self._running is not None:
            self._left = True
            self._go.release()
            self._running.result()

    def _run(self) -> None:
        if self._stream is not None:
            torch.accelerator.set_stream(self._stream)
        try:
            with torch.no_grad():
                self.output = forward_batch(self.block, self.inputs, self.i)
        except _Left:
            return
        except BaseException as error:  # noqa: BLE001 - raised again where the pass is gone on with
            self._error = error
        self._back.release()


class Walk:
    """All batches' passes through a block, stopping together in front of one linear after the other.

    A context manager: what still waits at its end is left.
    """

    def __init__(
        self, block: nn.Module, inputs: BlockInputs, stops: Sequence[str], threads: ThreadPoolExecutor
    ) -> None:
        """stops: linears in the order they run; see `can_walk`. threads: from `walkers`."""
        self.inputs = inputs
        self.passes = [_Pass(block, inputs, i, threads) for i in range(len(inputs.hidden))]
        self._stop = ""
        self._current: _Pass | None = None
        modules = linears(block)
        self._handles = [modules[name].register_forward_pre_hook(self._hook(name)) for name in stops]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            walking = self._current
            if walking is not None and name == self._stop and walking.at is None:
                walking.wait_with(args[0])

        return hook

    def to(self, stop: str) -> Iterator[Tensor]:
        """Batch after batch, the input [tokens, K] of linear `stop`, padding left out; `stop` has not run yet.

        A batch whose pass never comes to `stop` gives nothing.
        """
        for i in range(len(self.passes)):
            x = self.one_to(stop, i)
            if x is not None:
                yield x

    def one_to(self, stop: str, i: int) -> Tensor | None:
        """The same for one batch."""
        self._stop, self._current = stop, self.passes[i]
        self.passes[i].go_on()
        if self.inputs.device.type == "cpu":
            _trim()
        x = self.passes[i].at
        return None if x is None else counted_rows(stop, x, self.inputs.masks[i])

    def finish(self) -> list[Tensor]:
        """The block's outputs, [B, L, H] a batch, where its inputs are."""
        self._stop = ""
        outputs = []
        for one, hidden in zip(self.passes, self.inputs.hidden, strict=True):
            self._current = one
            one.go_on()
            assert one.output is not None
            outputs.append(one.output.to(hidden.device))
        check_finite(dict(enumerate(outputs)), self.inputs.masks)
        return outputs

    def __enter__(self) -> Walk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self.passes:
            one.leave()
        for handle in self._handles:
            handle.remove()


def walkers() -> ThreadPoolExecutor:
    """Threads for walks, started as they are needed and ended with the last reference to it.

    To be kept for a whole model: new threads for every block of 8B parameters cost 2.5 s a block on an H100.
    """
    return ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="forward pass")


def can_walk(
    block: nn.Module,
    in_turn: Sequence[Sequence[tuple[str, ...]]],
    groups: Sequence[tuple[str, ...]],
    widest: int,
    inputs: BlockInputs,
    streams: int,
) -> bool:
    """Whether `in_turn` can be served by passes that stop once a stage. widest: the largest of the linears' in_features.

    Each stage must be one whole group of linears with one input, the stages in the order that they run, and what the
    passes hold must fit: half of the free memory at most. Experts run up and down projections in turn, stages of theirs
    do not.
    """
    ordered = [stage[0] for stage in in_turn if len(stage) == 1]
    if len(ordered) < len(in_turn) or ordered != list(groups) or not inputs.hidden:
        return False
    if any(isinstance(module, UnfusedExperts) for module in block.modules()):
        return False
    if inputs.device.type == "cpu" and len(inputs.hidden) * streams * torch.get_num_threads() > _THREADS:
        return False
    # A stop's input, and of the block's own width: residual, output and something on the way.
    held = sum(
        h.numel() // h.shape[-1] * (widest + 3 * h.shape[-1]) * h.element_size() for h in inputs.hidden
    )
    return streams * held < free_memory(inputs.device) // 2


def free_memory(device: torch.device) -> int:
    """Bytes that tensors on `device` can still take."""
    if device.type == "cpu":
        import psutil

        return int(psutil.virtual_memory().available)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free, _ = torch.xpu.mem_get_info(device)
    return free + torch.xpu.memory_reserved(device) - torch.xpu.memory_allocated(device)


def _trim() -> None:
    """Give freed memory back to the system, where the C library is glibc: it keeps what a thread has freed for that thread,
    which here would be every batch's largest layer."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
