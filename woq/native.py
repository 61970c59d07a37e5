"""Compiled kernels: find the library, or build it once, or say why there is none.

A library is looked for in the package (wheels may carry it), then in the user's cache, and else compiled from `csrc` on
first use. The cache is keyed by everything the result depends on: sources, compiler, flags, torch. A build happens under
a file lock that the operating system drops with its holder, so a killed process blocks nobody, and is moved into place
in one step, so nobody loads half a file. Failing is not an error here: `why_not` returns the reason, and the backend
that asked stands back for the next one.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

PACKAGED = Path(__file__).parent / "_native"
SOURCES = Path(__file__).parents[1] / "csrc"
TIME_LIMIT = 900.0  # seconds for one build, waiting for another process's build included
STABLE_ABI = (2, 11)  # the oldest torch whose ABI the libraries use; one binary serves all later ones


class BuildError(Exception):
    """A library could not be built; the message is what `why_not` returns."""


@dataclass(frozen=True)
class Library:
    """How one library is built: its folder under `csrc`, its compiler, and the flags for this machine.

    compilers: what `compiler` looks for, for the message that it found none. own_flags: file name -> further flags.
    """

    folder: str
    suffixes: tuple[str, ...]
    compiler: Callable[[], Path | None]
    flags: Callable[[], list[str]]
    link: tuple[str, ...] = ()
    compilers: str = "nvcc of the CUDA toolkit"
    own_flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def find_nvcc() -> Path | None:
    """The CUDA compiler: on the path, or where NVIDIA's installer puts it."""
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    return None if found is None else Path(found)


def cuda_flags(capability: tuple[int, int] | None = None) -> list[str]:
    """nvcc flags for one architecture, the current device's by default. sm_90 is built as sm_90a, for wgmma."""
    major, minor = capability or torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")
    return ["-std=c++20", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xcompiler=-fPIC"]


def find_cpp() -> Path | None:
    """A C++ compiler: the system's own, g++ or clang++."""
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return None if found is None else Path(found)


def cpu_flags() -> list[str]:
    """Flags that every file of the CPU kernels shares: for the oldest processor of this kind."""
    return ["-std=c++20", "-O2", "-ftree-vectorize", "-fPIC", "-Wno-psabi"]


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
# One binary holds the kernels for every instruction set; csrc/cpu/isa.cpp picks at run time.
_INSTRUCTION_SETS = {
    "kernels_portable.cpp": (
        "-O1",
    ),  # for tests: every processor of the last ten years has one of the others
    "kernels_avx2.cpp": _AVX2,
    "kernels_avx2_vnni.cpp": (*_AVX2, "-mavxvnni"),
    "kernels_avx512.cpp": _AVX512,
    "kernels_avx512_vnni.cpp": (*_AVX512, "-mavx512vnni"),
    "kernels_avx512_bf16.cpp": (*_AVX512, "-mavx512vnni", "-mavx512bf16"),
}
_X86 = platform.machine().lower() in ("x86_64", "amd64")

LIBRARIES = {
    "cuda": Library("cuda", (".cu", ".cpp"), find_nvcc, cuda_flags, ("-ldl",)),
    "cpu": Library(
        "cpu",
        (".cpp",),
        find_cpp,
        cpu_flags,
        compilers="g++ or clang++",
        own_flags=_INSTRUCTION_SETS if _X86 else {},
    ),
}


def why_not(name: str) -> str | None:
    """None where the operators of library `name` are registered now, else the reason. Builds on the first call."""
    try:
        _load(name)
    except BuildError as error:
        return str(error)
    return None


@functools.cache
def _reason(name: str) -> str | None:
    try:
        path = find_or_build(name)
        torch.ops.load_library(str(path))
    except BuildError as error:
        return str(error)
    except OSError as error:  # what the dynamic loader raises
        return f"the compiled {name} kernels do not load: {error}"
    return None


def _load(name: str) -> None:
    reason = _reason(name)
    if reason is not None:
        raise BuildError(reason)


def find_or_build(name: str, *, flags: list[str] | None = None, cache: Path | None = None) -> Path:
    """The shared library `name`: packaged, cached, or compiled now. Raises BuildError with the reason."""
    packaged = PACKAGED / f"woq_{name}.so"
    if flags is None and packaged.exists() and not _outdated(name, packaged):
        return packaged
    return _cached_or_built(name, flags, cache)


def record_sources(name: str) -> None:
    """Write beside the packaged library `name` what it was built from, for checkouts whose sources move on."""
    (PACKAGED / f"woq_{name}.sources").write_text(_source_digest(LIBRARIES[name]), encoding="utf-8")


def _outdated(name: str, packaged: Path) -> bool:
    """Whether there are sources here, and others than the packaged library was built from. Wheels hold none."""
    record = packaged.with_suffix(".sources")
    if not record.exists() or not (SOURCES / LIBRARIES[name].folder).exists():
        return False
    if record.read_text(encoding="utf-8") == _source_digest(LIBRARIES[name]):
        return False
    logger.warning("%s was built from other sources than csrc holds now and is left aside", packaged)
    return True


def _cached_or_built(name: str, flags: list[str] | None, cache: Path | None) -> Path:
    library = LIBRARIES[name]
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < STABLE_ABI:
        raise BuildError(
            f"the {name} kernels need torch {STABLE_ABI[0]}.{STABLE_ABI[1]} or later, this is {torch.__version__}"
        )
    sources = sorted(p for p in (SOURCES / library.folder).glob("*") if p.suffix in library.suffixes)
    if not sources:
        raise BuildError(f"no compiled {name} kernels in the package, and no sources to build them from")
    compiler = library.compiler()
    if compiler is None:
        raise BuildError(f"no compiler for the {name} kernels ({library.compilers})")
    command = [str(compiler), *(library.flags() if flags is None else flags), *_torch_flags()]
    folder = (cache or cache_folder()) / f"{name}-{_key(library, command)}"
    target = folder / f"woq_{name}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + TIME_LIMIT
        with _locked(folder / "lock", deadline):
            if not target.exists():  # another process may have built it meanwhile
                _build(library, command, sources, target, deadline)
    return target


def build_into_package(name: str) -> Path:
    """Put library `name`, built anew where its sources changed, into the package, as wheels carry it. `make cpu` runs it.

    Raises BuildError with the reason.
    """
    built = _cached_or_built(name, None, None)
    PACKAGED.mkdir(exist_ok=True)
    target = PACKAGED / f"woq_{name}.so"
    partial = target.with_suffix(".partial")
    shutil.copyfile(built, partial)
    partial.replace(target)
    record_sources(name)
    return target


def cache_folder() -> Path:
    """Where built libraries are kept, by the platform's custom."""
    places = {"darwin": "Library/Caches", "win32": "AppData/Local"}
    return Path.home() / places.get(sys.platform, ".cache") / "woq"


def _torch_flags() -> list[str]:
    version = (STABLE_ABI[0] << 56) | (STABLE_ABI[1] << 48)
    return [f"-DTORCH_TARGET_VERSION={version:#018x}", f"-I{Path(torch.__file__).parent / 'include'}"]


def _key(library: Library, command: list[str]) -> str:
    """Digest of all that the binary depends on."""
    digest = hashlib.sha256(_source_digest(library).encode())
    compiler = subprocess.run([command[0], "--version"], capture_output=True, check=False, timeout=60).stdout
    own = [f"{file}: {' '.join(flags)}" for file, flags in sorted(library.own_flags.items())]
    flags = [part for part in command if not part.startswith("-I")]  # not where torch lies: its version
    for part in (*flags, *own, torch.__version__, platform.machine()):
        digest.update(part.encode() + b"\0")
    digest.update(compiler)
    return digest.hexdigest()[:16]


def _source_digest(library: Library) -> str:
    digest = hashlib.sha256()
    for path in sorted((SOURCES / library.folder).glob("*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _build(library: Library, command: list[str], sources: list[Path], target: Path, deadline: float) -> None:
    """Compile every source by itself, side by side, and link."""
    jobs = min(len(sources), os.cpu_count() or 1)
    logger.warning(
        "building %s with %s, %d files, %d at a time; this happens once",
        target.name,
        command[0],
        len(sources),
        jobs,
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = [Path(scratch) / f"{source.stem}{source.suffix}.o" for source in sources]

        def compile_one(source: Path, to: Path) -> None:
            own = library.own_flags.get(source.name, ())
            _run([*command, *own, "-c", str(source), "-o", str(to)], deadline)

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(compile_one, sources, objects))
        finished = Path(scratch) / target.name
        libraries = f"-L{Path(torch.__file__).parent / 'lib'}"
        _run(
            [
                command[0],
                "-shared",
                *map(str, objects),
                "-o",
                str(finished),
                libraries,
                "-ltorch_cpu",
                "-lc10",
                *library.link,
            ],
            deadline,
        )
        finished.replace(target)
    logger.warning("built %s in %.0f s", target, time.monotonic() - started)


def _run(command: list[str], deadline: float) -> None:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=max(1.0, deadline - time.monotonic()),
        )
    except subprocess.TimeoutExpired:
        raise BuildError(f"compiling the kernels took longer than {TIME_LIMIT:.0f} s") from None
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from None
    if done.returncode:
        raise BuildError(f"{Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()[-1500:]}")


@contextmanager
def _locked(path: Path, deadline: float) -> Iterator[None]:
    """Hold `path` locked. The system releases the lock with the process, however that ends."""
    with path.open("a+b") as file:
        while not _try_lock(file.fileno()):
            if time.monotonic() > deadline:
                raise BuildError(f"another process has been building the kernels for too long ({path})")
            time.sleep(0.2)
        yield  # closing the file unlocks it


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
