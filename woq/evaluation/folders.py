"""Evaluating checkpoints: text or token files to windows, folders to models, and the figures of both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from woq.errors import ConfigError
from woq.evaluation.divergence import compare
from woq.evaluation.perplexity import perplexity
from woq.evaluation.windows import windows_from_text
from woq.interop import find
from woq.loading import model_config, quiet_bars, resolve_folder
from woq.modeling import AutoModelForCausalLM
from woq.progress import ConsoleProgress

DEFAULT_SEQ_LEN = 2048  # what published perplexities use


@dataclass(frozen=True)
class Request:
    """What to evaluate on: exactly one of `text` and `tokens`."""

    text: Path | None = None
    tokens: str | None = None
    seq_len: int | None = None
    max_windows: int | None = None
    batch_size: int = 8


def evaluate_folder(
    path: str | Path, reference: str | Path | None, request: Request, *, backend: str = "auto", **options: Any
) -> dict[str, Any]:
    """Perplexity of the model in `path`; with `reference`, KL divergence and top-1 agreement too.

    options: device_map, dtype, trust_remote_code, as `AutoModelForCausalLM.from_pretrained` takes them; they hold for
    both models. Returns names and figures. Raises the errors of `woq.errors`.
    """
    folder = resolve_folder(path, {})
    windows = load_windows(folder, request, options.get("trust_remote_code", False))
    model = _model(folder, backend, options)
    result: dict[str, Any] = {
        "model": str(path),
        "windows": f"{len(windows)} x {windows.shape[1]} tokens",
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    with ConsoleProgress() as bars:
        bars.stage("evaluating", len(windows))
        if reference is None:
            result["perplexity"] = round(perplexity(model, windows, request.batch_size, bars.at).value, 4)
            return result
        original_folder = resolve_folder(reference, {})
        if find(original_folder) is not None:
            bars.say(f"note: the reference {reference} is quantized itself")
        with quiet_bars():
            original = AutoModelForCausalLM.from_pretrained(original_folder, **options)
        found = compare(model, original, windows, request.batch_size, bars.at)
    return result | {
        "perplexity": round(found.perplexity.value, 4),
        "reference_perplexity": round(found.reference_perplexity.value, 4),
        "KL_divergence": round(found.kl, 5),
        "top-1_agreement": round(found.top1_agreement, 4),
    }


def _model(folder: Path, backend: str, options: dict[str, Any]) -> Any:
    """The model in `folder`, or the one that `woq export onnx` put there, in ONNX Runtime on the CPU."""
    if (folder / "model.onnx").exists():
        from woq.export.runtime import OnnxCausalLM

        if backend != "auto" or options.get("device_map", "auto") not in ("auto", "cpu", None):
            raise ConfigError(f"{folder} is an ONNX model: it runs in ONNX Runtime on the CPU")
        return OnnxCausalLM(folder)
    with quiet_bars():
        return AutoModelForCausalLM.from_pretrained(folder, backend=backend, **options)


def load_windows(folder: Path, request: Request, trust_remote_code: bool = False) -> Tensor:
    """int64 [n, L]. Raises ConfigError unless exactly one readable source of enough tokens is given."""
    if (request.text is None) == (request.tokens is None):
        raise ConfigError(
            "pass a text file or a token file, one of the two", hint="--text FILE or --tokens FILE"
        )
    if request.text is not None:
        windows = _from_text(folder, request.text, request.seq_len, trust_remote_code)
    else:
        if request.seq_len is not None:
            raise ConfigError("a token file comes in windows: seq_len is for text")
        windows = _from_file(str(request.tokens))
    return windows[: request.max_windows]


def _from_text(folder: Path, file: Path, seq_len: int | None, trust_remote_code: bool) -> Tensor:
    from transformers import AutoTokenizer

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}", hint="--text takes a UTF-8 text file") from error
    if seq_len is None:
        config = model_config(folder, trust_remote_code).get_text_config()
        seq_len = min(DEFAULT_SEQ_LEN, getattr(config, "max_position_embeddings", DEFAULT_SEQ_LEN))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return windows_from_text(text, tokenizer, seq_len)


def _from_file(source: str) -> Tensor:
    """FILE or FILE:tensor; a colon that belongs to the path itself is left alone."""
    file, _, name = source.rpartition(":") if not Path(source).exists() else (source, "", "")
    path = Path(file or source)
    try:
        with safe_open(path, framework="pt") as handle:
            names = sorted(handle.keys())
            name = name or (names[0] if len(names) == 1 else "")
            if name not in names:
                raise ConfigError(f"{path} has no tensor {name!r}", hint=f"FILE:tensor with one of {names}")
            tokens: Tensor = handle.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"cannot read token file {path}: {error}", hint="FILE.safetensors[:tensor]"
        ) from error
    return tokens.to(torch.int64) if tokens.dtype == torch.int32 else tokens
