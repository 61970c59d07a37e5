"""Products of large float32 matrices: on tensor cores where there are some, as exact as rounding needs."""

from __future__ import annotations

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, whole: bool = False) -> Tensor:
    """a @ b, float32 [M, K] by [K, N]. whole: `a` holds integers up to 256, which bfloat16 has too.

    On CUDA each matrix is taken apart into two bfloat16 ones, x = high + low, and low times low is left out: the error is about
    2^-16 of |a| |b|, where TF32 has 2^-11, at several times the speed of float32. One product of three times the inner
    size sums up all parts in float32.
    """
    if not a.is_cuda:
        return a @ b
    b_high, b_low = _halves(b)
    if whole:
        a_high = a.bfloat16()
        left, right = torch.cat([a_high, a_high], 1), torch.cat([b_high, b_low], 0)
        return torch.mm(left, right, out_dtype=torch.float32)
    a_high, a_low = _halves(a)
    left = torch.cat([a_high, a_high, a_low], 1)
    right = torch.cat([b_high, b_low, b_high], 0)
    return torch.mm(left, right, out_dtype=torch.float32)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    high = x.bfloat16()
    return high, (x - high).bfloat16()
