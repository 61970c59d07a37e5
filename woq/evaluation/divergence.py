"""How far a quantized model's predictions are from the original's: the sharper measure of the two.

Perplexity can come out equal, even better, for a model that predicts something else; KL divergence cannot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from woq.errors import ConfigError
from woq.evaluation.perplexity import Perplexity, from_sum
from woq.evaluation.windows import (
    Progress,
    checked_windows,
    chunks,
    evaluating,
    refuse_non_finite,
    scored_logits,
)

COLUMNS = ("reference model's likelihood", "likelihood", "KL divergence", "top-1 agreement")


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
    sums = torch.zeros(len(COLUMNS), dtype=torch.float64)
    with evaluating(model, reference):
        for at in range(0, len(windows), batch_size):
            ids = windows[at : at + batch_size]
            expected, got = scored_logits(reference, ids), scored_logits(model, ids)
            if expected.shape != got.shape:
                raise ConfigError(f"vocabularies differ: model {got.shape[1]}, reference {expected.shape[1]}")
            scores = _scores(expected, got, ids[:, 1:].flatten())
            for column, what in zip(scores.unbind(1), COLUMNS, strict=True):
                refuse_non_finite(column, ids, at, what)
            sums += scores.double().sum(0).cpu()
            if progress is not None:
                progress(at + len(ids), len(windows))
    tokens = windows[:, 1:].numel()
    reference_loss, loss, kl, agreed = sums.tolist()
    return Divergence(
        kl=kl / tokens,
        top1_agreement=agreed / tokens,
        perplexity=from_sum(loss, tokens),
        reference_perplexity=from_sum(reference_loss, tokens),
        tokens=tokens,
    )


def _scores(expected: Tensor, got: Tensor, targets: Tensor) -> Tensor:
    """float32 [P, 4], the COLUMNS of each position, from both models' logits [P, V] and the next tokens [P]."""
    targets = targets.to(expected.device).unsqueeze(1)
    parts = []
    for part in chunks(*expected.shape):
        p = F.log_softmax(expected[part].float(), dim=-1)
        q = F.log_softmax(got[part].to(expected.device).float(), dim=-1)
        columns = (
            -p.gather(1, targets[part]).squeeze(1),
            -q.gather(1, targets[part]).squeeze(1),
            (p.exp() * (p - q)).sum(-1),
            (p.max(-1).indices == q.max(-1).indices).float(),
        )
        parts.append(torch.stack(columns, dim=1))
    return torch.cat(parts)
