"""What the README shows is run: its Python, its commands and the example, on a tiny model in place of the real one."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from woq.cli import app

ROOT = Path(__file__).resolve().parents[1]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the README names; here a random Llama of its group size
pytestmark = pytest.mark.filterwarnings("ignore::woq.calibration.CalibrationWarning")


def blocks(language: str) -> list[str]:
    """The README's code blocks in a language."""
    return re.findall(
        rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )


@pytest.fixture
def tiny(stories260k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and a tokenizer, in the working directory."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in stories260k.glob("tokenizer*"):
        shutil.copy(file, folder)
    (tmp_path / "my.txt").write_text("Once upon a time there was a little dog. " * 100, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return folder


def quickly(code: str) -> str:
    """The same with less calibration: a random model's text is worth nothing anyway."""
    return code.replace("group_size=64)", "group_size=64, num_samples=4, seq_len=64)")


def test_the_python_example(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("python")
    assert len(code.splitlines()) <= 15
    exec(compile(quickly(code.replace(MODEL, str(tiny))), "README.md", "exec"), {})
    assert "The capital of France is" in capsys.readouterr().out
    assert Path("SmolLM2-W4/model.safetensors").exists()


def test_the_commands(tiny: Path) -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("woq ")]
    assert {shlex.split(line)[1] for line in lines} == {"quantize", "inspect", "eval", "doctor"}
    for line in lines:
        arguments = shlex.split(line.replace(MODEL, str(tiny)))[1:]
        if arguments[0] == "quantize":
            arguments += ["--num-samples", "4", "--seq-len", "64"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{line}\n{result.stderr}"


def test_the_make_targets_exist() -> None:
    targets = [
        line.split()[1] for block in blocks("bash") for line in block.splitlines() if line.startswith("make ")
    ]
    assert targets == ["demo", "test"]
    subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, capture_output=True, check=True)


def test_every_code_block_is_of_a_kind_that_is_run() -> None:
    known = ("woq ", "make ", "pip install .")
    lines = [line for block in blocks("bash") for line in block.splitlines() if line]
    assert all(line.startswith(known) for line in lines)


def test_the_file_tree_is_true() -> None:
    (tree,) = blocks("text")
    named = [line.split()[0] for line in tree.splitlines()]
    assert named and [name for name in named if not (ROOT / name).exists()] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_example(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tiny), "out", "--group-size", "32", "--num-samples", "4", "--seq-len", "64"]
    monkeypatch.setattr("sys.argv", ["quickstart.py", *arguments])
    runpy.run_path(str(ROOT / "examples/quickstart.py"), run_name="__main__")
    assert "14 layers, 100.0% of the blocks' weights" in capsys.readouterr().out
