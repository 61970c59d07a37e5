"""lm-eval's tasks on any folder that we load: its Hugging Face model class around a model of ours.

Needs `pip install 'woq[eval]'`. Tasks and their data come from lm-eval, or from a folder with task files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from woq.errors import ConfigError
from woq.loading import quiet_bars, resolve_folder
from woq.modeling import AutoModelForCausalLM, tokenizer_of

_NOT_FIGURES = ("alias", "name", "sample_len", "sample_count")  # what else stands in a task's results


def harness_model(model: Any, tokenizer: Any, *, batch_size: int = 8, max_length: int | None = None) -> Any:
    """`model` as lm-eval takes one: `lm_eval.simple_evaluate(harness_model(model, tokenizer), tasks=[...])`.

    model: a transformers causal LM, quantized or not. max_length: tokens of a prompt; None: what the model has
    positions for. Raises ConfigError where lm-eval is not installed.
    """
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ConfigError(f"lm-eval cannot be imported: {error}", hint="pip install 'woq[eval]'") from error
    return HFLM(
        pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=max_length
    )


def evaluate_model(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    task_folder: str | Path | None = None,
) -> dict[str, dict[str, float]]:
    """Task or group of tasks -> figure as lm-eval names it ("acc,none", "acc_stderr,none") -> value.

    limit: samples of each task at most; for trying only. task_folder: task files of one's own, in place
    of lm-eval's. Raises ConfigError for a task that is not there, or where its data cannot be had.
    """
    wrapped = harness_model(model, tokenizer, batch_size=batch_size)
    from lm_eval import simple_evaluate

    manager = _tasks(tasks, task_folder)
    try:
        found = simple_evaluate(
            wrapped,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=False,
        )
    except (OSError, ValueError) as error:  # data sets are downloaded
        raise ConfigError(f"tasks {list(tasks)} cannot be run: {error}") from error
    assert found is not None  # only in processes of rank 1 and later
    return {
        name: {
            figure: value
            for figure, value in values.items()
            if figure not in _NOT_FIGURES and isinstance(value, float | int)
        }
        for name, values in found["results"].items()
    }


def _tasks(names: Sequence[str], folder: str | Path | None) -> Any:
    """What finds the tasks: lm-eval's own, thousands of files that it takes minutes to list, or a folder's alone."""
    from lm_eval.tasks import TaskManager

    found = TaskManager() if folder is None else TaskManager(include_path=str(folder), include_defaults=False)
    unknown = [name for name in names if not found.match_tasks([name])]
    if unknown or not names:
        where = "lm-eval" if folder is None else str(folder)
        raise ConfigError(f"{where} has no task {unknown}", hint="`lm_eval ls tasks` lists lm-eval's own")
    return found


def evaluate_tasks(
    path: str | Path, tasks: Sequence[str], *, backend: str = "auto", loading: dict[str, Any], **how: Any
) -> dict[str, dict[str, float]]:
    """`evaluate_model` on the model and tokenizer in `path`. loading: as `AutoModelForCausalLM.from_pretrained` takes it.

    Raises ConfigError, and the errors of loading.
    """
    folder = resolve_folder(path, {})
    if (folder / "model.onnx").exists():
        raise ConfigError(f"{folder} is an ONNX model: tasks run on the folder it was exported from")
    tokenizer = tokenizer_of(folder)
    if tokenizer is None:
        raise ConfigError(f"{folder} has no tokenizer, and tasks are text")
    with quiet_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, backend=backend, **loading)
    return evaluate_model(model, tokenizer, tasks, **how)


def by_figure(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """ "task: figure" -> value, rounded, for people."""
    return {
        f"{task}: {name}": round(value, 4)
        for task, figures in found.items()
        for name, value in figures.items()
    }
