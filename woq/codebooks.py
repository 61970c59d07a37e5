"""4-bit codebooks: a code stands for one of sixteen values, times the group's scale. No zero points.

    W[n, k] = scales[n, g(k)] * VALUES[data_type][codes[n, k]]

- nf4: quantiles of a normal distribution scaled to [-1, 1], zero among them (Dettmers et al. 2023, QLoRA); the table is
  bitsandbytes'.
- fp4: bitsandbytes' own sign + 3 bits, divided by 12, in its numbering: code 8 + i is minus code i, so zero has two codes.
- fp4_e2m1: the 4-bit float of the OCP MX formats, in its numbering. neural-compressor's list of this name has 0.0625 where
  E2M1 has 0.5: its checkpoints are not this.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FP4 = (0.0, 0.0052083335, 0.6666667, 1.0, 0.33333334, 0.5, 0.16666667, 0.25)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

VALUES: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    "fp4": _FP4 + tuple(-value for value in _FP4),
    "fp4_e2m1": _E2M1 + tuple(-value for value in _E2M1),
}
"""Data type -> the value of every code."""

BITS = 4


def table(data_type: str, like: Tensor) -> Tensor:
    """float32 [16]: the value of every code, on the device of `like`."""
    return torch.tensor(VALUES[data_type], dtype=torch.float32, device=like.device)


def nearest(x: Tensor, data_type: str) -> Tensor:
    """Codes, int64 like `x`, of the values nearest to `x`; the lower one of two equally near."""
    values, codes = table(data_type, x).sort(stable=True)
    middles = (values[1:] + values[:-1]) / 2
    return codes[torch.bucketize(x.contiguous(), middles)]


def largest(data_type: str) -> float:
    """The largest magnitude in the table: a group's absmax divided by it is the scale that covers the group."""
    return max(map(abs, VALUES[data_type]))


def is_mirrored(data_type: str) -> bool:
    """Whether every value stands there with both signs, so that a scale's sign makes no difference."""
    return set(VALUES[data_type]) == {-value for value in VALUES[data_type]}
