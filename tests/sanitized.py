"""The CPU kernels as AddressSanitizer and UndefinedBehaviorSanitizer watch them: `make asan`.

A pytest plugin (`-p tests.sanitized`, with both runtimes of the compiler preloaded) that puts this build in the place of
the library that would be found otherwise. Everything outside of the kernels runs as usual.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from woq import native

FLAGS = (
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    # Checks of every access in place, and twice over, would make each file take minutes to compile.
    "--param=asan-instrumentation-with-call-threshold=0",
    "-fno-sanitize=alignment,null,object-size,pointer-overflow,vptr",
)


def build() -> Path:
    """The library, from the cache or built now; without the runtimes preloaded, which would watch the compiler too."""
    return native.find_or_build("cpu", flags=[*native.cpu_flags(), *FLAGS])


def pytest_configure() -> None:
    """What cannot be loaded must not pass as a machine without kernels, whose tests are skipped."""
    native.PACKAGED = build().parent  # comes before all others
    reason = native.why_not("cpu")
    if reason is not None:
        raise pytest.UsageError(reason)
