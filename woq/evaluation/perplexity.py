"""Perplexity in the standard protocol: non-overlapping windows, every next token scored, each window on its own.

What is not done: no sliding context, no beginning-of-sequence token added. The first token of a window has nothing
before it and is not scored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from woq.evaluation.windows import (
    Progress,
    checked_windows,
    chunks,
    evaluating,
    refuse_non_finite,
    scored_logits,
)


@dataclass(frozen=True)
class Perplexity:
    """value = exp(nll); nll: mean negative log-likelihood a token, natural log; tokens: how many were scored."""

    value: float
    nll: float
    tokens: int


def perplexity(
    model: nn.Module, windows: Tensor, batch_size: int = 8, progress: Progress | None = None
) -> Perplexity:
    """Perplexity of `model` on `windows`, integer token ids [n, L]: n * (L - 1) tokens are scored.

    Log-softmax in float32 whatever the model's dtype, sums in float64. Raises ConfigError on unusable windows and
    WoqError where a token's likelihood is not finite.
    """
    windows = checked_windows(windows, model)
    total = 0.0
    with evaluating(model):
        for at in range(0, len(windows), batch_size):
            ids = windows[at : at + batch_size]
            losses = _token_losses(scored_logits(model, ids), ids)
            refuse_non_finite(losses, ids, at, "likelihood")
            total += float(losses.double().sum())
            if progress is not None:
                progress(at + len(ids), len(windows))
    return from_sum(total, windows[:, 1:].numel())


def _token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Negative log-likelihood, float32 [B * (L-1)], of each next token of ids [B, L] under logits [B * (L-1), V]."""
    targets = ids[:, 1:].flatten().to(logits.device)
    parts = [
        F.cross_entropy(logits[part].float(), targets[part], reduction="none")
        for part in chunks(*logits.shape)
    ]
    return torch.cat(parts)


def from_sum(total: float, tokens: int) -> Perplexity:
    """From summed negative log-likelihoods; a perplexity beyond float64 is infinite."""
    nll = total / tokens
    return Perplexity(value=math.exp(nll) if nll < 709 else math.inf, nll=nll, tokens=tokens)
