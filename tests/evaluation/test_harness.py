"""lm-eval on a model of ours, with a task made here (`make test-eval`; elsewhere skipped where lm-eval is not installed)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

import woq
from woq.cli import app
from woq.errors import ConfigError
from woq.evaluation.harness import evaluate_model, harness_model

CHOICES = [" dog", " was a big", " and the"]
QUESTIONS = ["Once upon a time there", "The little girl saw a", "He went to the park", "She said, I like"]
TASK = """
task: next_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: label
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.fixture
def folder(stories260k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A quantized folder, with a task of four questions beside it."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    woq.quantize_folder(
        stories260k, tmp_path / "W4", woq.RtnConfig(group_size=32, on_ragged_group="smaller", device="cpu")
    )
    rows = [{"text": text, "choices": CHOICES, "label": i % 3} for i, text in enumerate(QUESTIONS)]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks/next_words.yaml").write_text(TASK.format(data=tmp_path / "tasks/rows.jsonl"))
    return tmp_path / "W4"


def accuracy_by_hand(model: Any, tokenizer: Any) -> float:
    """The choice whose tokens are likeliest, question by question."""
    right = 0
    for i, text in enumerate(QUESTIONS):
        scores = []
        for choice in CHOICES:
            start = len(tokenizer(text).input_ids)
            ids = torch.tensor([tokenizer(text + choice).input_ids])
            with torch.no_grad():
                logs = model(ids).logits[0, start - 1 : -1].float().log_softmax(-1)
            scores.append(float(logs.gather(1, ids[0, start:, None]).sum()))
        right += scores.index(max(scores)) == i % 3
    return right / len(QUESTIONS)


@pytest.mark.filterwarnings("default")  # lm-eval's own
def test_a_task(folder: Path) -> None:
    pytest.importorskip("lm_eval", reason="`make test-eval` makes an environment with lm-eval")
    model = woq.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tasks = folder.parent / "tasks"
    found = evaluate_model(model, tokenizer, ["next_words"], task_folder=tasks, batch_size=3)
    assert found["next_words"]["acc,none"] == accuracy_by_hand(model, tokenizer)
    with pytest.raises(ConfigError, match=r"no task \['nonesuch'\]"):
        evaluate_model(model, tokenizer, ["nonesuch"], task_folder=tasks)
    through_the_command(folder, tasks, found["next_words"]["acc,none"])
    through_neural_compressors_names(folder, tasks, found["next_words"]["acc,none"])
    (tasks / "rows.jsonl").unlink()
    shutil.rmtree(folder.parent / "cache")
    with pytest.raises(ConfigError, match="cannot be run"):
        evaluate_model(model, tokenizer, ["next_words"], task_folder=tasks)


def through_the_command(folder: Path, tasks: Path, expected: float) -> None:
    called = ["eval", str(folder), "--tasks", "next_words", "--task-folder", str(tasks), "--dtype", "float32"]
    done = CliRunner().invoke(app, [*called, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout[done.stdout.index("{") :])["next_words"]["acc,none"] == expected
    done = CliRunner().invoke(app, [*called, "--text", "x.txt"])
    assert done.exit_code != 0


def through_neural_compressors_names(folder: Path, tasks: Path, expected: float) -> None:
    from woq.compat.neural_compressor.evaluation.lm_eval import LMEvalParser, evaluate

    args = LMEvalParser(
        model="hf", model_args=f"pretrained={folder},trust_remote_code=False,dtype=float32", tasks="next_words",
        device="cpu", batch_size=4, include_path=str(tasks),
    )  # fmt: skip
    assert evaluate(args)["results"]["next_words"]["acc,none"] == expected
    model = woq.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32)
    at_hand = LMEvalParser(
        user_model=model, tokenizer=AutoTokenizer.from_pretrained(folder), tasks="next_words", limit=2,
        include_path=str(tasks),
    )  # fmt: skip
    assert evaluate(at_hand)["results"]["next_words"]["acc,none"] in (0, 0.5, 1)
    with pytest.raises(ConfigError, match="peft"):
        evaluate(LMEvalParser(model_args=f"pretrained={folder},peft=x"))


def test_without_lm_eval(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.models.huggingface", None)
    with pytest.raises(ConfigError, match="lm-eval cannot be imported"):
        harness_model(None, None)
    done = CliRunner().invoke(app, ["eval", str(folder), "--tasks", "hellaswag"])
    assert done.exit_code != 0
