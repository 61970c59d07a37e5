"""How far a quantized model's predictions are from the original's: the sharper measure of the two.

Perplexity can come out equal, even better, for a model that predicts something else; KL divergence cannot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from woq.errors import ConfigError
from woq.evaluation.perplexity import Perplexity, from_sum, token_losses
from woq.evaluation.windows import (
    Progress,
    checked_windows,
    chunks,
    evaluating,
    refuse_non_finite,
    scored_logits,
)


@dataclass(frozen=True)
class Divergence:
    """Means over all scored tokens, at the positions perplexity scores.

    kl: KL(reference || model), natural log. top1_agreement: share of positions where both rate the same token
    highest.
    """

    kl: float
    top1_agreement: float
    perplexity: Perplexity
    reference_perplexity: Perplexity
    tokens: int


def compare(
    model: nn.Module,
    reference: nn.Module,
    windows: Tensor,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Divergence:
    """Run both models once over `windows`, integer token ids [n, L], and compare their predictions.

    float32 probabilities, float64 sums. The models may sit on different devices. Raises ConfigError where windows or
    vocabularies do not fit, and WoqError where a prediction is not finite.
    """
    windows = checked_windows(checked_windows(windows, model), reference)
    tokens = windows[:, 1:].numel()
    loss = reference_loss = kl = 0.0
    agreed = 0
    with evaluating(model, reference):
        for at in range(0, len(windows), batch_size):
            ids = windows[at : at + batch_size]
            expected, got = scored_logits(reference, ids), scored_logits(model, ids)
            if expected.shape != got.shape:
                raise ConfigError(f"vocabularies differ: model {got.shape[1]}, reference {expected.shape[1]}")
            losses, reference_losses = token_losses(got, ids), token_losses(expected, ids)
            divergences, same = _divergences(expected, got)
            refuse_non_finite(reference_losses, ids, at, "reference model's likelihood")
            refuse_non_finite(losses, ids, at, "likelihood")
            refuse_non_finite(divergences, ids, at, "KL divergence")
            loss += float(losses.double().sum())
            reference_loss += float(reference_losses.double().sum())
            kl += float(divergences.double().sum())
            agreed += same
            if progress is not None:
                progress(at + len(ids), len(windows))
    return Divergence(
        kl=kl / tokens,
        top1_agreement=agreed / tokens,
        perplexity=from_sum(loss, tokens),
        reference_perplexity=from_sum(reference_loss, tokens),
        tokens=tokens,
    )


def _divergences(expected: Tensor, got: Tensor) -> tuple[Tensor, int]:
    """KL(expected || got), float32 [P], of logits [P, V], and at how many positions the maximum is the same token."""
    parts = []
    same = 0
    for part in chunks(*expected.shape):
        p = F.log_softmax(expected[part].float(), dim=-1)
        q = F.log_softmax(got[part].to(expected.device).float(), dim=-1)
        parts.append(F.kl_div(q, p, reduction="none", log_target=True).sum(-1))
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    return torch.cat(parts), same
