"""A layer's input second moment H = X'X: gathered over calibration tokens, factored, and used to weigh an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from woq.algorithms.products import product
from woq.errors import CalibrationError
from woq.moe import expert_kind

_LADDER = (1.0, 10.0, 100.0)  # multiples of damp_percent, tried in turn
# Rows of a second moment computed at a time: narrow enough to skip most of the lower half, wide enough for the device.
_STRIPE = {"cpu": 144}
_STRIPE_ACCELERATOR = 1024
_SOLVED_AT_ONCE = 512  # size of a triangular matrix that is inverted by one solve
FEW_TOKENS = 32  # an expert that fewer reached is told what its siblings saw


@dataclass
class SecondMoment:
    """Sums over the calibration tokens that reach one input, float32 [K, K].

    upper: of x' x, meaningful on and above the diagonal: the rest mirrors it. borrowed: tokens' worth of other experts'
    moments that `fill_up_rare_experts` added to it. drift: of x' (x_float - x), x_float being the float model's input
    for the same token; None where that is not known.
    """

    upper: Tensor
    tokens: int = 0
    borrowed: int = 0
    drift: Tensor | None = None
    _name: str = ""
    _faulty: Tensor | None = (
        None  # tokens with NaN or infinity, counted on the device: asked for once, at the end
    )

    @classmethod
    def zeros(cls, features: int, device: torch.device, drifting: bool = False) -> SecondMoment:
        return cls(
            torch.zeros(features, features, device=device),
            drift=torch.zeros(features, features, device=device) if drifting else None,
        )

    def add(self, name: str, x: Tensor, float_x: Tensor | None = None) -> None:
        """Add x [tokens, K] of layer `name` and, for the drift, what the float model has there."""
        self._name = name
        wrong = (~torch.isfinite(x.sum(1, dtype=torch.float32))).sum()
        self._faulty = wrong if self._faulty is None else self._faulty + wrong
        self.tokens += x.shape[0]
        stripe = max(_STRIPE.get(x.device.type, _STRIPE_ACCELERATOR), x.shape[1] // 16)
        for start in range(0, x.shape[1], stripe):  # the lower half would only repeat the upper one
            _add_product(
                self.upper[start : start + stripe, start:], x[:, start : start + stripe], x[:, start:]
            )
        if self.drift is not None and float_x is not None:
            _add_product(self.drift, x, float_x.to(x.dtype) - x)

    def normalized(self) -> Tensor:
        """The mean over tokens [K, K], so that figures do not depend on how much data there was.

        Raises CalibrationError naming the layer where an input was not finite.
        """
        if self._faulty is not None and (faulty := int(self._faulty)):
            raise CalibrationError(
                f"layer {self._name!r}: its input is NaN or infinite in {faulty} of {self.tokens} tokens",
                hint="calibrate in bfloat16 or float32; look for damaged weights in the layers before",
            )
        mean = self.upper / max(self.tokens + self.borrowed, 1)
        return mean.triu() + mean.triu(1).t()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a' b in float32. Products of 16-bit floats are exact in float32: there tensor cores lose nothing."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16) and b.dtype == a.dtype:
        total.add_(torch.mm(a.t(), b, out_dtype=torch.float32))
    else:
        total.addmm_(a.float().t(), b.float())


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
        alike = [m for m in siblings.values() if m.upper.shape == own.upper.shape]
        if own.tokens >= FEW_TOKENS or not alike:
            continue
        own.borrowed = FEW_TOKENS - own.tokens
        mean = sum((m.upper for m in alike), torch.zeros_like(own.upper)) / sum(m.tokens for m in alike)
        own.upper += own.borrowed * mean
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
    drift = (moment.drift.t() / (moment.tokens / share))[:, order]
    if len(weight) > len(drift):  # whichever order of the three products is the cheaper
        return weight + product(weight, product(product(drift, factor.t()), factor))[:, back]
    return weight + product(product(product(weight, drift), factor.t()), factor)[:, back]


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
        factor = _triangular_inverse(upper)
        if torch.isfinite(factor).all():
            return factor.float().contiguous()  # LAPACK's come by columns; kernels read along rows
    return None


def _triangular_inverse(upper: Tensor) -> Tensor:
    """By halves: the inverse of [[A, B], [0, C]] has -A^-1 B C^-1 above its diagonal, products instead of a solve."""
    size = len(upper)
    if size <= _SOLVED_AT_ONCE:
        eye = torch.eye(size, dtype=upper.dtype, device=upper.device)
        solved: Tensor = torch.linalg.solve_triangular(upper, eye, upper=True)
        return solved
    half = size // 2
    inverse = torch.zeros_like(upper)
    first, last = _triangular_inverse(upper[:half, :half]), _triangular_inverse(upper[half:, half:])
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[:half, half:] = -(first @ upper[:half, half:] @ last)
    return inverse


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
    return float(relative_errors(weight, quantized, hessian, [len(weight)])[0])


def relative_errors(weight: Tensor, quantized: Tensor, hessian: Tensor, rows: Sequence[int]) -> list[float]:
    """`relative_error` of linears that stand in one tall matrix, `rows` of each."""
    difference = weight - quantized
    error = (product(difference, hessian) * difference).sum(1)
    output = (product(weight, hessian) * weight).sum(1)
    parts = zip(error.split(list(rows)), output.split(list(rows)), strict=True)
    return torch.stack([e.sum() / o.sum().clamp(min=1e-30) for e, o in parts]).tolist()
