"""Seconds by phase of quantizing, for benchmarks: nothing is measured, and no device waited for, unless asked."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch


class _Clock:
    """Seconds of each phase, those of phases inside it left out. Waits for the device at every border."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.open: list[str] = ["other"]
        self.since = time.perf_counter()

    def turn(self) -> None:
        """Book the time since the last border to the phase that is open."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[self.open[-1]] = self.seconds.get(self.open[-1], 0.0) + now - self.since
        self.since = now


_clock: ContextVar[_Clock | None] = ContextVar("woq phases", default=None)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """What happens inside counts as `name` where phases are measured."""
    clock = _clock.get()
    if clock is None:
        yield
        return
    clock.turn()
    clock.open.append(name)
    try:
        yield
    finally:
        clock.turn()
        clock.open.pop()


@contextmanager
def measured(device: torch.device) -> Iterator[dict[str, float]]:
    """Measure phases: the dict is filled by the end of the context, "other" included."""
    clock = _Clock(device)
    token = _clock.set(clock)
    try:
        yield clock.seconds
    finally:
        clock.turn()
        _clock.reset(token)
