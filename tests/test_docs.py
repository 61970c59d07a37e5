"""What the pages in docs/ show is run, a page in one go, on a tiny model in place of the real one."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import woq
from woq.cli import app

DOCS = Path(__file__).resolve().parents[1] / "docs"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the pages name; here a random Llama of its group size
QUICKLY = {
    "group_size=64)": "group_size=64, num_samples=4, seq_len=64)"
}  # a random model's text is worth nothing
PAGES = ["transformers", "migrating", pytest.param("onnx", marks=pytest.mark.slow)]
NEEDED = {"transformers": ("peft",), "onnx": ("onnx", "onnxruntime", "onnxscript")}
pytestmark = [
    pytest.mark.filterwarnings("ignore::woq.calibration.CalibrationWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]


@pytest.fixture
def here(stories260k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a float folder `tiny`, its quantized `SmolLM2-W4`, and a text."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    for file in stories260k.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "tiny")
    woq.quantize_folder(
        tmp_path / "tiny", tmp_path / "SmolLM2-W4", woq.RtnConfig(group_size=64, device="cpu")
    )
    (tmp_path / "my.txt").write_text("Once upon a time there was a little dog. " * 100, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows(page: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in NEEDED.get(page, ()):
        pytest.importorskip(package)
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    found = re.findall(r"```(python|bash)\n(.*?)```", text, re.DOTALL)
    assert found
    names: dict[str, object] = {}
    for language, code in found:
        code = code.replace(MODEL, "tiny")
        for written, run in QUICKLY.items():
            code = code.replace(written, run)
        if language == "python":
            exec(compile(code, f"docs/{page}.md", "exec"), names)
            continue
        for line in code.splitlines():
            done = CliRunner().invoke(app, shlex.split(line)[1:])
            assert done.exit_code == 0, f"{line}\n{done.output}"


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_lead_somewhere(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#:]+\.md)(?:#[^)]*)?\)", text)
    assert [target for target in targets if not (DOCS / target).exists()] == []
