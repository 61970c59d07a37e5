"""The maths of one group of weights: choose a scale and a zero point, quantize, dequantize.

Tensors only; a group is the last dimension. `w = scale * (code - zero)` with codes and zeros in 0 .. 2^bits-1.
Scales are rounded to the dtype they will be stored in before any code is computed: computing codes with float32
scales and casting afterwards (as neural-compressor does) shifts every weight of the group.

Symmetric grids fix zero = 2^(bits-1), so they reach one step further below zero than above it. `minmax` centres
them (scale = absmax / (2^bits-1) * 2, compressed-tensors' rule: half a step of the largest weight is clipped);
`mse` searches the scale, its sign included, for the smallest squared error: a negative scale puts the longer side
where the largest weight is. Neither suffers from original GPTQ's rule for groups without negative weights, which
clips their largest weight at 7/15 (formats.md section 1.5).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

Search = Literal["minmax", "mse"]

# Elements a search handles at once: a slice and its temporaries stay in a core's cache (CPU), or fill a GPU.
_CHUNK = {"cpu": 1 << 17}
_CHUNK_ACCELERATOR = 1 << 25


def quantize(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes of `w` [..., gs] as float integers in 0 .. 2^bits-1, for scale and zero [..., 1]."""
    return torch.div(w, scale).round_().add_(zero).clamp_(0, (1 << bits) - 1)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """`scale * (codes - zero)`."""
    return (codes - zero).mul_(scale)


def storable_scale(scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Round `scale` (float32) to what `scale_dtype` can hold, away from zero and inside its finite range.

    A scale that underflows would make the group zero or infinite. float16 goes down to 2^-20, a subnormal with four
    bits left: small 8-bit scales need it, and codes are computed for the scale as stored.
    """
    limits = torch.finfo(scale_dtype)
    smallest = 2.0**-20 if scale_dtype == torch.float16 else limits.tiny
    sign = torch.where(scale < 0, -1.0, 1.0)
    magnitude = scale.abs().clamp_(smallest, limits.max)
    return (magnitude * sign).to(scale_dtype).float()


def group_params(
    w: Tensor,
    bits: int,
    sym: bool,
    scale_dtype: torch.dtype,
    search: Search = "mse",
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every group.

    Args:
        w: float32 [..., gs], one group in the last dimension.
        bits: width of a code, 2 to 8.
        sym: zero point fixed at 2^(bits-1).
        scale_dtype: what the scales will be stored in.
        search: "minmax" covers the whole range; "mse" takes, of a fixed list of shrunken ranges, the one with the
            smallest squared error.
        importance: weight of each element's squared error, broadcastable to `w`; for "mse" only.

    Returns:
        float32 scale and zero, both [...]: the scale exactly representable in `scale_dtype`, the zero an integer.
    """
    flat = w.reshape(-1, w.shape[-1])
    weights = None if importance is None else importance.expand_as(w).reshape(-1, w.shape[-1])
    rows = max(1, _CHUNK.get(w.device.type, _CHUNK_ACCELERATOR) // w.shape[-1])
    parts = [
        _best_params(
            chunk, bits, sym, scale_dtype, search, None if weights is None else weights[i * rows :][:rows]
        )
        for i, chunk in enumerate(flat.split(rows))
    ]
    shape = w.shape[:-1]
    return torch.cat([p[0] for p in parts]).view(shape), torch.cat([p[1] for p in parts]).view(shape)


def _best_params(
    w: Tensor, bits: int, sym: bool, scale_dtype: torch.dtype, search: Search, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    candidates = _symmetric(w, bits, search) if sym else _asymmetric(w, bits, search)
    best_error = best_scale = best_zero = None
    for scale, zero in candidates:
        scale = storable_scale(scale, scale_dtype)
        if not sym:  # the zero point belongs to the scale that is stored, not to the ideal one
            zero = torch.div(zero, scale).neg_().round_().clamp_(0, (1 << bits) - 1)
        if search == "minmax":
            return scale.squeeze(-1), zero.squeeze(-1)
        error = dequantize(quantize(w, scale, zero, bits), scale, zero).sub_(w).square_()
        error = (error if weights is None else error.mul_(weights)).sum(-1, keepdim=True)
        if best_error is None or best_scale is None or best_zero is None:
            best_error, best_scale, best_zero = error, scale, zero
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    assert best_scale is not None and best_zero is not None  # every generator yields at least once
    return best_scale.squeeze(-1), best_zero.squeeze(-1)


def _shrink_factors(bits: int) -> list[float]:
    """Shares of the full range to try, the full range first. Fewer bits gain from cutting deeper."""
    deepest = {2: 0.3, 3: 0.45, 4: 0.6}.get(bits, 0.75)
    steps = 24
    return [1.0 - (1.0 - deepest) * i / (steps - 1) for i in range(steps)]


def _symmetric(w: Tensor, bits: int, search: Search) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales with the fixed middle zero point; an all-zero group gets scale 1."""
    absmax = w.abs().amax(-1, keepdim=True)
    absmax = torch.where(absmax == 0, torch.ones_like(absmax), absmax)
    zero = torch.full_like(absmax, 1 << (bits - 1))
    widest = absmax * (2 / ((1 << bits) - 1))
    for factor in _shrink_factors(bits):
        yield widest * factor, zero
        if search == "mse":
            yield widest * -factor, zero


def _asymmetric(w: Tensor, bits: int, search: Search) -> Iterator[tuple[Tensor, Tensor]]:
    """(scale, lower end) of ranges that always contain zero, so that zero stays exactly representable."""
    low = w.amin(-1, keepdim=True).clamp_(max=0)
    high = w.amax(-1, keepdim=True).clamp_(min=0)
    span = high - low
    high = torch.where(span == 0, torch.ones_like(high), high)
    for factor in _shrink_factors(bits):
        yield (high - low) * (factor / ((1 << bits) - 1)), low * factor
    if search == "mse":  # a lone outlier on one side: cut that side only
        for factor in _shrink_factors(bits)[1::2]:
            yield (high * factor - low) / ((1 << bits) - 1), low
            yield (high - low * factor) / ((1 << bits) - 1), low * factor
