"""Token windows to evaluate on, and running a model over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from woq.calibration.batches import INTEGER_DTYPES, vocabulary_size
from woq.errors import ConfigError, WoqError

CHUNK_ELEMENTS = 2**20  # logits held in float32 at a time, beside the models' own output: what caches hold

Progress = Callable[[int, int], None]  # windows done, windows in all


def windows_from_text(text: str, tokenizer: Any, seq_len: int) -> Tensor:
    """Cut `text` into int64 [n, seq_len], without special tokens; the incomplete tail is dropped.

    Raises ConfigError where the text is shorter than one window.
    """
    if seq_len < 2:
        raise ConfigError(f"seq_len={seq_len}: a window needs two tokens for one to be predicted")
    ids = torch.tensor(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64
    )
    if len(ids) < seq_len:
        raise ConfigError(
            f"the text has {len(ids)} tokens, one window takes {seq_len}",
            hint="take a longer text or a smaller seq_len",
        )
    return ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)


def checked_windows(windows: Tensor, model: nn.Module) -> Tensor:
    """`windows` as int64. Raises ConfigError unless they are token ids [n >= 1, L >= 2] of the model's vocabulary."""
    if windows.dim() != 2 or windows.dtype not in INTEGER_DTYPES or len(windows) < 1 or windows.shape[1] < 2:
        raise ConfigError(
            f"windows are {windows.dtype} {list(windows.shape)}, expected token ids [n >= 1, L >= 2]"
        )
    low, high, size = int(windows.min()), int(windows.max()), vocabulary_size(model)
    if low < 0 or (size is not None and high >= size):
        raise ConfigError(
            f"windows hold token ids from {low} to {high}, the model's vocabulary has {size}",
            hint="tokenize with the model's own tokenizer",
        )
    return windows.to(torch.int64)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each model's own mode comes back after."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def scored_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [B * (L-1), V] that predict the next token of ids [B, L], in the model's dtype and on its device."""
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    logits: Tensor = model(input_ids=ids.to(device), use_cache=False).logits
    return logits[:, :-1].flatten(0, 1)


def chunks(positions: int, vocabulary: int) -> Iterator[slice]:
    """Slices of `positions` whose float32 logits stay within CHUNK_ELEMENTS."""
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    for start in range(0, positions, size):
        yield slice(start, min(start + size, positions))


def refuse_non_finite(values: Tensor, ids: Tensor, first_window: int, what: str) -> None:
    """Raise WoqError naming the first window whose entry of `values` [B * (L-1)] is not finite."""
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        window, position = divmod(int(bad[0]), ids.shape[1] - 1)
        raise WoqError(
            f"window {first_window + window}, position {position}: the {what} is not finite",
            hint="float16 overflows on models trained in bfloat16: load with dtype='bfloat16' or 'float32'",
        )
