"""`neural_compressor.evaluation.lm_eval`: its arguments, our adapter for lm-eval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from woq.errors import ConfigError
from woq.evaluation.harness import evaluate_model, evaluate_tasks

_KNOWN_ARGS = ("pretrained", "trust_remote_code", "dtype")


@dataclass
class LMEvalParser:
    """What to evaluate: a model at hand with its tokenizer, or one by `model_args="pretrained=<folder>,..."`."""

    model: str = "hf"
    tasks: str = "lambada_openai"
    model_args: str = ""
    user_model: Any = None
    tokenizer: Any = None
    num_fewshot: int | None = None
    batch_size: int = 1
    device: str | None = None
    limit: int | None = None
    include_path: str | None = None
    trust_remote_code: bool = False
    add_bos_token: bool = False


def evaluate(args: LMEvalParser) -> dict[str, Any]:
    """{"results": {task: {figure: value}}}, as lm-eval names them. Raises ConfigError and the errors of loading."""
    if args.model != "hf":
        raise ConfigError(f"LMEvalParser.model = {args.model!r}", hint="'hf'")
    how: dict[str, Any] = {
        "num_fewshot": args.num_fewshot,
        "limit": args.limit,
        "batch_size": args.batch_size,
        "task_folder": args.include_path,
    }
    tasks = args.tasks.split(",")
    if args.user_model is not None:
        if args.add_bos_token:
            args.tokenizer.add_bos_token = True
        return {"results": evaluate_model(args.user_model, args.tokenizer, tasks, **how)}
    given = dict(part.split("=", 1) for part in args.model_args.split(",") if part)
    unknown = sorted(given.keys() - set(_KNOWN_ARGS))
    if unknown or "pretrained" not in given or args.add_bos_token:
        raise ConfigError(
            f"LMEvalParser: model_args={args.model_args!r}, add_bos_token={args.add_bos_token}",
            hint=f"pretrained=<folder> and any of {_KNOWN_ARGS[1:]}; add_bos_token goes with user_model",
        )
    trusted = args.trust_remote_code or given.get("trust_remote_code") == "True"
    loading = {"trust_remote_code": trusted, "device_map": args.device, "dtype": given.get("dtype", "auto")}
    return {"results": evaluate_tasks(given["pretrained"], tasks, loading=loading, **how)}
