"""A layer's input second moment H = X'X: gathered over calibration tokens, factored, and used to weigh an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from woq.errors import CalibrationError
from woq.moe import expert_kind

_LADDER = (1.0, 10.0, 100.0)  # multiples of damp_percent, tried in turn
FEW_TOKENS = 32  # an expert that fewer reached is told what its siblings saw


@dataclass
class SecondMoment:
    """Sums over the calibration tokens that reach one input, float32 [K, K].

    matrix: of x' x. borrowed: tokens' worth of other experts' moments that `fill_up_rare_experts` added to it.
    drift: of x' (x_float - x), x_float being the float model's input for the same token; None where that is not known.
    """

    matrix: Tensor
    tokens: int = 0
    borrowed: int = 0
    drift: Tensor | None = None

    @classmethod
    def zeros(cls, features: int, device: torch.device, drifting: bool = False) -> SecondMoment:
        return cls(
            torch.zeros(features, features, device=device),
            drift=torch.zeros(features, features, device=device) if drifting else None,
        )

    def add(self, name: str, x: Tensor, float_x: Tensor | None = None) -> None:
        """Add x [tokens, K] and, for the drift, what the float model has there.

        Raises CalibrationError naming the layer where x is not finite.
        """
        x = x.float()
        if not torch.isfinite(x).all():
            raise CalibrationError(
                f"layer {name!r}: its input is NaN or infinite in {int((~torch.isfinite(x)).any(1).sum())} of "
                f"{x.shape[0]} tokens",
                hint="calibrate in bfloat16 or float32; look for damaged weights in the layers before",
            )
        self.matrix.addmm_(x.t(), x)
        if self.drift is not None and float_x is not None:
            self.drift.addmm_(x.t(), float_x.float() - x)
        self.tokens += x.shape[0]

    def normalized(self) -> Tensor:
        """The mean over tokens, so that figures do not depend on how much data there was."""
        return self.matrix / max(self.tokens + self.borrowed, 1)


def fill_up_rare_experts(
    moments: Mapping[str, SecondMoment], groups: Sequence[Sequence[str]]
) -> dict[str, int]:
    """Fill up the moments of experts that calibration hardly reached; which layers, and from how many siblings.

    moments: by the first name of each of `groups`, linears that share an input. An expert with fewer than FEW_TOKENS
    tokens gets the mean moment a token of its block's other experts, weighed as the tokens it lacks: with no token of its own,
    that mean is all it has. Siblings are linears whose names differ in one index alone and whose inputs have the same size; where
    none was reached either, nothing changes.
    """
    by_name = {name: moments[group[0]] for group in groups for name in group}
    full = {name: moment for name, moment in by_name.items() if moment.tokens >= FEW_TOKENS}
    lenders: dict[str, dict[int, SecondMoment]] = {}
    for name, moment in full.items():
        lenders.setdefault(expert_kind(name), {})[id(moment)] = moment
    filled = {}
    for group in groups:
        own, siblings = moments[group[0]], lenders.get(expert_kind(group[0]), {})
        alike = [m for m in siblings.values() if m.matrix.shape == own.matrix.shape]
        if own.tokens >= FEW_TOKENS or not alike:
            continue
        own.borrowed = FEW_TOKENS - own.tokens
        mean = sum((m.matrix for m in alike), torch.zeros_like(own.matrix)) / sum(m.tokens for m in alike)
        own.matrix += own.borrowed * mean
        filled.update(dict.fromkeys(group, len(alike)))
    return filled


def make_up_for_drift(
    weight: Tensor, moment: SecondMoment, factor: Tensor, order: Tensor, share: float
) -> Tensor:
    """The weight [N, K] that makes of the quantized model's inputs what `weight` makes of the float model's.

    In least squares that is W + W (X_q' (X - X_q))' (X_q' X_q)^-1, here with `share` of the correction (GPTAQ, Li et
    al. 2025, https://arxiv.org/abs/2504.02692, and Qronos, Zhang et al. 2025, https://arxiv.org/abs/2505.11695, take
    it whole). factor: U with U'U = H^-1 in `order`.
    """
    if moment.drift is None or share == 0:
        return weight
    back = torch.argsort(order)
    moved = (weight @ (moment.drift.t() / moment.tokens))[:, order]
    return weight + share * (moved @ factor.t() @ factor)[:, back]


def inverse_factor(hessian: Tensor, damping: float) -> Tensor | None:
    """Upper triangular U with U'U = (hessian + damping * mean diagonal * I)^-1, or None if that is not definite.

    Reversing rows and columns turns the lower factor L of a matrix into an upper one: H = R R' with R = flip(L), so
    H^-1 = (R^-1)' (R^-1).
    """
    for dtype in (torch.float32, torch.float64):
        h = hessian.to(dtype, copy=True)
        h.diagonal().add_(damping * h.diagonal().mean())
        lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
        if failed:
            continue
        upper = lower.flip(0, 1)
        factor: Tensor = torch.linalg.solve_triangular(
            upper, torch.eye(len(h), dtype=dtype, device=h.device), upper=True
        )
        if torch.isfinite(factor).all():
            return factor.float()
    return None


def factor_with_ladder(hessian: Tensor, damp_percent: float) -> tuple[Tensor, float] | None:
    """The first rung of the damping ladder that can be factored, with the damping it took."""
    for rung in _LADDER:
        damping = min(damp_percent * rung, 1.0)
        factor = inverse_factor(hessian, damping)
        if factor is not None:
            return factor, damping
    return None


def relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """tr(D H D') / tr(W H W'), D = weight - quantized: the squared output error relative to the output."""
    difference = weight - quantized
    error = ((difference @ hessian) * difference).sum()
    return float(error / ((weight @ hessian) * weight).sum().clamp(min=1e-30))
