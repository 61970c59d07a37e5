"""How long work tells where it is. `Progress` says nothing; `ConsoleProgress` draws bars on stderr with rich."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

import torch

from woq.report import LayerReport


class Progress:
    """Receives what happens; this one ignores it. Use as a context manager."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def say(self, message: str) -> None:
        """A line worth reading."""

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` steps begins; the one before has ended."""

    def step(self, detail: str = "") -> None:
        """One step is done."""

    def at(self, done: int, total: int) -> None:
        """The stage is at `done` of `total`, where the total was not known before."""

    def layer(self, report: LayerReport) -> None:
        """A layer is quantized."""


class ConsoleProgress(Progress):
    """A bar a stage with the current block, the last loss, time left and peak memory; plain lines off a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars

        self._console = Console(stderr=True)
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: Any = None
        self._name, self._total, self._done = "", 0, 0
        self._losses: list[float] = []

    def __enter__(self) -> Progress:
        self._bars.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.__exit__(kind, error, trace)

    def say(self, message: str) -> None:
        self._console.print(message, highlight=False, markup=False)

    def stage(self, name: str, total: int) -> None:
        if self._task is not None:
            self._bars.stop_task(self._task)
        self._name, self._total, self._done = name, total, 0
        self._task = self._bars.add_task(name, total=total, detail="")

    def step(self, detail: str = "") -> None:
        self._done += 1
        if self._losses:
            detail += f"  mean loss {sum(self._losses) / len(self._losses):.2e}"
            self._losses.clear()
        detail = f"{detail}  {peak_memory()}".strip()
        self._bars.update(self._task, advance=1, detail=detail)
        if self._bars.disable:
            self.say(f"{self._name} {self._done}/{self._total} {detail}")

    def at(self, done: int, total: int) -> None:
        self._bars.update(self._task, completed=done, total=total)

    def layer(self, report: LayerReport) -> None:
        self._losses.append(report.loss)
        if report.note:
            self.say(f"{report.layer}: {report.note}")


def peak_memory() -> str:
    """Peak resident memory of this process, and of the GPU where one was used."""
    if sys.platform == "win32":
        import psutil

        peak = psutil.Process().memory_info().peak_wset
    else:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, Linux kibibytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    text = f"peak {peak / 2**30:.1f} GiB"
    if torch.cuda.is_initialized():
        text += f", GPU {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    return text
