"""AWQ: input features that matter are scaled up before rounding, and ranges are clipped by the error of the output.

Lin et al. 2023, https://arxiv.org/abs/2306.00978. A fold's scale is s = r^a, r the root mean square of each input
feature, with the exponent a out of a grid that lowers tr(D H D') most: the squared error of the outputs of all linears
behind the fold, H the second moment of their inputs.

Differences from the paper's code, each for a reason:
- The error is computed from H, a matrix product for every exponent, instead of by running the parent module on all
  calibration data. Each linear's error counts relative to its output, so that the large outputs of k do not drown those
  of v (docs/folds.md has the figures).
- Exponents are compared on whole ranges; where ranges will be clipped, half the exponent and none get another chance.
- Folds are found in the block and proven, with grouped heads, 1 + w norms and routers (woq/folds), not listed by model.
- Clipping looks at the covariance inside the group (`output_params`), and every linear is clipped, q and k too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from woq.algorithms.hessian import relative_error
from woq.algorithms.scaling import Consumer, InputScaling, round_by_output
from woq.configs import AwqConfig
from woq.folds import Fold

_EXPONENTS = tuple(i / 20 for i in range(20))


class Awq(InputScaling[AwqConfig]):
    """See the module's head."""

    @property
    def scales_inputs(self) -> bool:
        return self.config.auto_scale

    @property
    def clips(self) -> bool:
        return self.config.auto_clip

    def scale(self, fold: Fold, consumers: Sequence[Consumer]) -> Tensor:
        return search_scale(fold, consumers, self.clips)


def search_scale(fold: Fold, consumers: Sequence[Consumer], clips: bool) -> Tensor:
    """The scale [channels] with the least output error.

    Exponents are compared with every group's whole range, which is quick; where ranges will be clipped, what was found
    must then hold its own against half of it and none, clipped.
    """
    power = torch.stack([fold.shared(c.moment.diagonal()) for c in consumers]).mean(0)
    seen = power > 0
    if not seen.any():
        return torch.ones_like(power)
    # Calibration says nothing of a feature it never excites: an average one.
    root = torch.where(seen, power, power[seen].mean()).sqrt()

    def best(exponents: Sequence[float], clipped: bool) -> float:
        errors = [output_error(fold, consumers, _power_scale(root, a), clipped) for a in exponents]
        return exponents[errors.index(min(errors))]

    exponent = best(_EXPONENTS, clipped=False)
    if clips:
        exponent = best((exponent, exponent / 2, 0.0), clipped=True)
    return _power_scale(root, exponent)


def _power_scale(root: Tensor, exponent: float) -> Tensor:
    """root^exponent, the geometric mean of its extremes 1."""
    s = root.pow(exponent)
    return (s / (s.max() * s.min()).sqrt()).clamp(1e-4, 1e4)


def output_error(fold: Fold, consumers: Sequence[Consumer], s: Tensor, clipped: bool) -> float:
    """Squared output errors, relative to the outputs, of all consumers rounded with the scale `s` [channels]."""
    features, total = s[fold.source], 0.0
    for consumer in consumers:
        moment = consumer.moment / (features.unsqueeze(1) * features) if clipped else None
        rounded = round_by_output(consumer.weight * features, consumer.spec, moment).dequantize()
        total += relative_error(consumer.weight, rounded / features, consumer.moment)
    return total
