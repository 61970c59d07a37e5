"""Finding and building compiled kernels, with a compiler made of a few lines of shell; and once with the real one."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from woq import native
from woq.native import BuildError, Library

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the pretended compiler is a shell script")

COMPILER = """#!/bin/sh
case "$*" in *--version*) echo pretended 1.0; exit 0;; esac
echo "$@" >> "$(dirname "$0")/calls"
{extra}
while [ $# -gt 0 ]; do [ "$1" = -o ] && echo built > "$2"; shift; done
"""


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library "demo" with one source and a compiler that only notes how it is called; the folder it all is in."""
    (tmp_path / "csrc/demo").mkdir(parents=True)
    (tmp_path / "csrc/demo/kernel.cpp").write_text("int f() { return 1; }")
    write_compiler(tmp_path, "")
    library = Library("demo", (".cpp",), lambda: tmp_path / "cc", lambda: ["-fast"])
    monkeypatch.setattr(native, "LIBRARIES", {"demo": library})
    monkeypatch.setattr(native, "SOURCES", tmp_path / "csrc")
    monkeypatch.setattr(native, "PACKAGED", tmp_path / "packaged")
    return tmp_path


def write_compiler(folder: Path, extra: str) -> None:
    (folder / "cc").write_text(COMPILER.format(extra=extra))
    (folder / "cc").chmod(0o755)


def calls(folder: Path) -> int:
    log = folder / "calls"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_builds_once_and_says_so(pretend: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        built = native.find_or_build("demo", cache=pretend / "cache")
    assert built.read_text() == "built\n"
    assert "building woq_demo.so" in caplog.text
    assert calls(pretend) == 2  # compile, link
    assert native.find_or_build("demo", cache=pretend / "cache") == built
    assert calls(pretend) == 2


def test_a_packaged_library_wins(pretend: Path) -> None:
    (pretend / "packaged").mkdir()
    (pretend / "packaged/woq_demo.so").write_text("shipped")
    assert native.find_or_build("demo", cache=pretend / "cache") == pretend / "packaged/woq_demo.so"
    assert calls(pretend) == 0


def test_a_packaged_library_of_other_sources_is_left_aside(
    pretend: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "cache_folder", lambda: pretend / "cache")
    packaged = native.build_into_package("demo")
    assert native.find_or_build("demo") == packaged
    (pretend / "csrc/demo/kernel.cpp").write_text("int f() { return 2; }")
    with caplog.at_level(logging.WARNING):
        assert native.find_or_build("demo").is_relative_to(pretend / "cache")
    assert "built from other sources" in caplog.text
    assert native.build_into_package("demo") == packaged
    assert native.find_or_build("demo") == packaged
    (pretend / "csrc/demo/kernel.cpp").unlink()  # as a wheel has it
    (pretend / "csrc/demo").rmdir()
    assert native.find_or_build("demo") == packaged


@pytest.mark.parametrize("change", ["source", "flags", "compiler"])
def test_whatever_the_result_depends_on_is_in_the_key(pretend: Path, change: str) -> None:
    first = native.find_or_build("demo", cache=pretend / "cache")
    if change == "source":
        (pretend / "csrc/demo/kernel.cpp").write_text("int f() { return 2; }")
    if change == "compiler":
        (pretend / "cc").write_text((pretend / "cc").read_text().replace("1.0", "2.0"))
    flags = ["-slow"] if change == "flags" else None
    assert native.find_or_build("demo", cache=pretend / "cache", flags=flags) != first


def test_a_failing_compiler_is_a_reason_and_leaves_nothing_behind(pretend: Path) -> None:
    write_compiler(pretend, 'echo "kernel.cpp:1: no such thing" >&2; exit 1')
    with pytest.raises(BuildError, match="no such thing"):
        native.find_or_build("demo", cache=pretend / "cache")
    assert not list((pretend / "cache").rglob("*.so"))


def test_a_slow_compiler_is_stopped(pretend: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "TIME_LIMIT", 1.0)
    write_compiler(pretend, "exec sleep 30")
    started = time.monotonic()
    with pytest.raises(BuildError, match="took longer"):
        native.find_or_build("demo", cache=pretend / "cache")
    assert time.monotonic() - started < 10


def test_no_compiler_no_sources_old_torch_are_reasons(pretend: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    with pytest.raises(BuildError, match=r"torch 2\.11"):
        native.find_or_build("demo", cache=pretend / "cache")
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    nothing = Library("demo", (".cpp",), lambda: None, list)
    monkeypatch.setattr(native, "LIBRARIES", {"demo": nothing})
    with pytest.raises(BuildError, match="no compiler"):
        native.find_or_build("demo", cache=pretend / "cache")
    (pretend / "csrc/demo/kernel.cpp").unlink()
    with pytest.raises(BuildError, match="no sources"):
        native.find_or_build("demo", cache=pretend / "cache")


def test_a_file_that_is_no_library_is_a_reason(pretend: Path) -> None:
    (pretend / "packaged").mkdir()
    (pretend / "packaged/woq_demo.so").write_text("not a library")
    native._reason.cache_clear()
    reason = native.why_not("demo")
    native._reason.cache_clear()
    assert reason is not None
    assert "do not load" in reason


def test_a_living_process_is_waited_for_and_a_dead_one_is_not(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import fcntl, time; f = open({str(lock)!r}, 'a'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    with (
        pytest.raises(BuildError, match="another process"),
        native._locked(lock, time.monotonic() + 0.5),
    ):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with native._locked(lock, time.monotonic() + 0.5):
        pass


ONE_OF_EACH = """
#include "decode.cuh"
#include "prefill.cuh"
using namespace woq;
#define DECODE(TURN, BITS, UNITS) \\
  template __global__ void woq::decode_kernel<__nv_bfloat16, TURN, BITS, UNITS>(const __grid_constant__ DecodeArgs);
using Digits = DigitTurn<__nv_bfloat16, 3, 4>;
using Floats = FloatTurn<__nv_bfloat16, 4, 1, 4>;
DECODE(Digits, 3, 4)
DECODE(Floats, 4, 4)
#if KERNELS_OF_HOPPER
#define PREFILL(TOKENS, GROUPS, ONE_GROUP) \\
  template __global__ void woq::prefill_kernel<__nv_bfloat16, 4, TOKENS, GROUPS, ONE_GROUP>( \\
      const __grid_constant__ PrefillArgs, const __grid_constant__ CUtensorMap, const __grid_constant__ CUtensorMap);
PREFILL(8, 4, true)
PREFILL(16, 4, true)
PREFILL(64, 4, false)
PREFILL(128, 3, true)
PREFILL(128, 4, true)
PREFILL(256, 2, true)
#endif
"""


def compiled(source: Path, out: Path, capability: tuple[int, int], *flags: str) -> str:
    """What nvcc says about `source`; skips without it. No GPU is needed."""
    nvcc = native.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc on this machine")
    command = [
        str(nvcc),
        *native.cuda_flags(capability),
        *native._torch_flags(),
        f"-I{native.SOURCES / 'cuda'}",
        *flags,
    ]
    done = subprocess.run(
        [*command, "-c", str(source), "-o", str(out)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", ["ops.cpp", "dequantize.cu"])
def test_host_code_and_smallest_kernels_compile(tmp_path: Path, name: str) -> None:
    compiled(native.SOURCES / "cuda" / name, tmp_path / "out.o", (9, 0))


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_one_kernel_of_each_kind_compiles(tmp_path: Path, capability: tuple[int, int]) -> None:
    """And the compiler overlaps wgmma with what makes its operands: where it cannot prove that safe, it says C75xx."""
    source = tmp_path / "kernels.cu"
    source.write_text(ONE_OF_EACH)
    said = compiled(
        source,
        tmp_path / "out.o",
        capability,
        "-Xptxas=-v",
        f"-DKERNELS_OF_HOPPER={int(capability == (9, 0))}",
    )
    assert "decode_kernel" in said
    assert "(C75" not in said
