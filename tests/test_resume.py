"""A run killed at any block and resumed writes the same bytes as one that was never interrupted."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from woq import GPTQConfig, RtnConfig, quantize_folder
from woq.errors import CheckpointError
from woq.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
QUIET = Progress()
CONFIG: dict[str, Any] = {
    "group_size": 32,
    "on_ragged_group": "pad",
    "num_samples": 8,
    "seq_len": 32,
    "desc_act": True,
}

# Stops for good as soon as `stop_after` blocks are on disk, so that the kill finds it in the middle of the run.
CHILD = """
import sys, time
from woq import GPTQConfig, quantize_folder
from woq.progress import Progress

class Stopping(Progress):
    steps = 0
    def step(self, detail=""):
        if "layers" in detail:
            self.steps += 1
        if self.steps == int(sys.argv[3]):
            print("stopped", flush=True)
            time.sleep(600)

quantize_folder(sys.argv[1], sys.argv[2], GPTQConfig(**{config!r}), progress=Stopping())
""".replace("{config!r}", repr(CONFIG))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes; not the two that tell how many seconds it took."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith("quantization_")}


@pytest.fixture(scope="module")
def unbroken(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "q"
    quantize_folder(stories260k, folder, GPTQConfig(**CONFIG), progress=QUIET)
    return folder


def kill_after(blocks: int, source: Path, target: Path) -> None:
    """Run in a process of its own and SIGKILL it when so many blocks are written."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(source), str(target), str(blocks)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "stopped\n"
    finally:
        child.kill()
        assert child.wait(30) == -signal.SIGKILL
        child.stdout.close()


@pytest.mark.parametrize("blocks", [1, 4])
def test_killed_and_resumed(blocks: int, stories260k: Path, unbroken: Path, tmp_path: Path) -> None:
    target, partial = tmp_path / "q", tmp_path / "q.partial"
    kill_after(blocks, stories260k, target)
    assert not target.exists()
    written = sorted(p.name for p in partial.glob("block-*"))
    assert written == [f"block-{i:05d}.safetensors" for i in range(blocks)]
    before = {name: (partial / name).stat().st_mtime_ns for name in written}
    steps: list[str] = []

    class Watching(Progress):
        def step(self, detail: str = "") -> None:
            if "layers" in detail:
                steps.append(detail)
                files = {p.name: p.stat().st_mtime_ns for p in partial.glob("block-*")}
                assert before.items() <= files.items()  # what was finished is not done again

    report = quantize_folder(stories260k, target, GPTQConfig(**CONFIG), resume=True, progress=Watching())
    assert len(steps) == 5
    assert {layer.layer for layer in report.layers} == set(report.plan.specs)
    assert contents(target) == contents(unbroken)
    assert not partial.exists()


def test_killed_inside_a_write(stories260k: Path, unbroken: Path, tmp_path: Path) -> None:
    """A half-written block has another name until it is whole."""
    target, partial = _stopped(stories260k, tmp_path, None), tmp_path / "q.partial"
    whole = (partial / "block-00000.safetensors").read_bytes()
    (partial / "block-00002.safetensors.tmp").write_bytes(whole[: len(whole) // 2])
    quantize_folder(stories260k, target, GPTQConfig(**CONFIG), resume=True, progress=QUIET)
    assert contents(target) == contents(unbroken)


def test_killed_at_any_later_moment(
    stories260k: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end is many small steps (shards, metadata, the rename): stop before each in turn, resume, compare."""

    class Killed(BaseException):
        pass

    reached = 0
    for name, owner in (("replace", Path), ("unlink", Path), ("rename", Path)):
        real = getattr(owner, name)
        for stop_at in range(0, 40, 3):
            calls = 0

            def dying(
                self: Path, *args: Any, real: Any = real, stop_at: int = stop_at, **options: Any
            ) -> Any:
                nonlocal calls
                if "q.partial" in str(self):
                    calls += 1
                    if calls > stop_at:
                        raise Killed
                return real(self, *args, **options)

            target = tmp_path / f"{name}{stop_at}" / "q"
            target.parent.mkdir()
            try:
                with monkeypatch.context() as patch:
                    patch.setattr(owner, name, dying)
                    quantize_folder(stories260k, target, RTN, progress=QUIET)
                break  # it ran to its end: there are no more steps of this kind
            except Killed:
                reached += 1
            assert not target.exists()
            quantize_folder(stories260k, target, RTN, resume=True, progress=QUIET)
            if stop_at == 0 and name == "replace":
                expected = contents(target)
            assert contents(target) == expected
            shutil.rmtree(target.parent)
    assert reached > 5


RTN = RtnConfig(group_size=32, search="minmax", on_ragged_group="pad")


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"bits": 3}, "config"), ({"seed": 1}, "config|data"), ({"damp_percent": 0.05}, "config")],
)
def test_another_configuration_is_refused(
    changes: dict[str, Any], told: str, stories260k: Path, tmp_path: Path
) -> None:
    target = _stopped(stories260k, tmp_path, ids())
    before = contents(tmp_path / "q.partial")
    with pytest.raises(CheckpointError, match=rf"q\.partial was begun differently \(({told}): then .*, now "):
        quantize_folder(
            stories260k, target, GPTQConfig(**{**CONFIG, **changes}), ids(), resume=True, progress=QUIET
        )
    assert contents(tmp_path / "q.partial") == before
    assert not target.exists()


def test_other_data_or_dtype_is_refused(stories260k: Path, tmp_path: Path) -> None:
    target = _stopped(stories260k, tmp_path, ids())
    config = GPTQConfig(**CONFIG)
    with pytest.raises(CheckpointError, match=r"begun differently \(data: "):
        quantize_folder(stories260k, target, config, ids(7), resume=True, progress=QUIET)
    with pytest.raises(CheckpointError, match=r"begun differently \(model: .*bfloat16"):
        quantize_folder(stories260k, target, config, ids(), dtype="bfloat16", resume=True, progress=QUIET)
    with pytest.raises(CheckpointError, match=r"q\.partial holds an unfinished run\n.*resume"):
        quantize_folder(stories260k, target, config, ids(), progress=QUIET)


def test_existing_target(stories260k: Path, tmp_path: Path) -> None:
    target = tmp_path / "q"
    quantize_folder(stories260k, target, RTN, progress=QUIET)
    before = contents(target)
    with pytest.raises(CheckpointError, match=r"q exists and is not empty\n.*overwrite"):
        quantize_folder(stories260k, target, RtnConfig(bits=3, group_size=-1), progress=QUIET)
    assert contents(target) == before

    class Looking(Progress):
        def step(self, detail: str = "") -> None:
            assert contents(target) == before  # the old one stands until the new one is whole

    (target / "notes.txt").write_text("mine")
    before = contents(target)
    quantize_folder(stories260k, target, RtnConfig(bits=3, group_size=-1), overwrite=True, progress=Looking())
    after = contents(target)
    assert after["config.json"] != before["config.json"]
    assert after["notes.txt"] == b"mine"
    assert [p.name for p in tmp_path.iterdir()] == ["q"]


def test_resuming_nothing_is_beginning(stories260k: Path, unbroken: Path, tmp_path: Path) -> None:
    quantize_folder(stories260k, tmp_path / "q", GPTQConfig(**CONFIG), resume=True, progress=QUIET)
    assert contents(tmp_path / "q") == contents(unbroken)


def ids(seed: int = 0) -> list[torch.Tensor]:
    return [torch.randint(3, 512, (8, 32), generator=torch.Generator().manual_seed(seed))]


def _stopped(source: Path, tmp_path: Path, calibration: list[torch.Tensor] | None) -> Path:
    """A run that stopped after its second block."""

    class Stop(Exception):
        pass

    class Stopping(Progress):
        def step(self, detail: str = "") -> None:
            if "layers.1" in detail:
                raise Stop

    with pytest.raises(Stop):
        quantize_folder(source, tmp_path / "q", GPTQConfig(**CONFIG), calibration, progress=Stopping())
    return tmp_path / "q"
