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

from typing import Literal

import torch
from torch import Tensor

from woq import codebooks

Search = Literal["minmax", "mse"]
Grid = Literal["plain", "full_range", "float_zeros"]

# Elements a search works on at once, candidates included: they and their temporaries stay in a core's cache (CPU), or
# fill a GPU.
_CHUNK = {"cpu": 1 << 18}
_CHUNK_ACCELERATOR = 1 << 26
_STEPS = 24  # ranges tried from the full one down to the deepest cut
_DEEPEST = {
    2: 0.3,
    3: 0.45,
    4: 0.6,
}  # share of the full range; more bits gain nothing from cutting deeper than 0.75


def quantize(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes of `w` [..., gs] as float integers in 0 .. 2^bits-1, for scale and zero [..., 1]."""
    return torch.div(w, scale).round_().add_(zero).clamp_(0, (1 << bits) - 1)


def quantize_between(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """`quantize` for zero points that are no whole numbers, where w / scale + zero is what has to be rounded."""
    return torch.div(w, scale).add_(zero).round_().clamp_(0, (1 << bits) - 1)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """`scale * (codes - zero)`."""
    return (codes - zero).mul_(scale)


def storable_scale(scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Round `scale` (float32) to what `scale_dtype` can hold, away from zero and inside its finite range.

    A scale that underflows would make the group zero or infinite. float16 goes down to 2^-20, a subnormal with four
    bits left: small 8-bit scales need it, and codes are computed for the scale as stored.
    """
    sign = torch.where(scale < 0, -1.0, 1.0)
    magnitude = scale.abs().clamp_(smallest_scale(scale_dtype), torch.finfo(scale_dtype).max)
    return (magnitude * sign).to(scale_dtype).float()


def smallest_scale(scale_dtype: torch.dtype) -> float:
    """The least magnitude that `storable_scale` gives."""
    return 2.0**-20 if scale_dtype == torch.float16 else torch.finfo(scale_dtype).tiny


def group_params(
    w: Tensor,
    bits: int,
    sym: bool,
    scale_dtype: torch.dtype,
    search: Search = "mse",
    importance: Tensor | None = None,
    grid: Grid = "plain",
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
        grid: "full_range" (symmetric) gives the scale the sign that lets code 0 stand for the largest weight;
            "float_zeros" (asymmetric) does not round zero points to whole numbers, but to `scale_dtype`.

    Returns:
        float32 scale and zero, both [...]: the scale exactly representable in `scale_dtype`, the zero an integer or,
        with float zeros, representable too.
    """
    plain = _symmetric if sym else _asymmetric
    choose = {"plain": plain, "full_range": _full_range, "float_zeros": _float_zeros}[grid]
    flat = w.reshape(-1, w.shape[-1])
    costs = None if importance is None else importance.expand_as(w).reshape(flat.shape)
    candidates = len(group_factors(bits, sym, search))
    rows = _rows_at_once(w, candidates)
    scales, zeros = [], []
    for start in range(0, len(flat), rows):
        chunk = flat[start : start + rows]
        scale, zero = choose(chunk, bits, scale_dtype, w.new_tensor(group_factors(bits, sym, search)))
        if candidates > 1:
            to_codes = quantize_between if grid == "float_zeros" else quantize
            error = dequantize(to_codes(chunk, scale, zero, bits), scale, zero).sub_(chunk).square_()
            best = _least(error, None if costs is None else costs[start : start + rows])
            scale, zero = scale.gather(0, best), zero.gather(0, best)
        scales.append(scale[0, :, 0])
        zeros.append(zero[0, :, 0])
    return torch.cat(scales).view(w.shape[:-1]), torch.cat(zeros).view(w.shape[:-1])


def codebook_scales(
    w: Tensor,
    data_type: str,
    scale_dtype: torch.dtype,
    search: Search = "mse",
    importance: Tensor | None = None,
) -> Tensor:
    """Scale of every group for codes out of a table (woq/codebooks.py); arguments and result as of `group_params`."""
    flat = w.reshape(-1, w.shape[-1])
    costs = None if importance is None else importance.expand_as(w).reshape(flat.shape)
    shares = [1.0] if search == "minmax" else _shares(codebooks.BITS)
    if search != "minmax" and not codebooks.is_mirrored(data_type):
        shares += [-share for share in shares]
    factors = w.new_tensor(shares).view(-1, 1, 1) / codebooks.largest(data_type)
    rows = _rows_at_once(w, len(shares))
    scales = []
    for start in range(0, len(flat), rows):
        chunk = flat[start : start + rows]
        scale = storable_scale(_absmax(chunk) * factors, scale_dtype)
        if len(shares) > 1:
            codes = codebooks.nearest(chunk / scale, data_type)
            error = (codebooks.table(data_type, w)[codes] * scale).sub_(chunk).square_()
            best = _least(error, None if costs is None else costs[start : start + rows])
            scale = scale.gather(0, best)
        scales.append(scale[0, :, 0])
    return torch.cat(scales).view(w.shape[:-1])


def _rows_at_once(w: Tensor, candidates: int) -> int:
    return max(1, _CHUNK.get(w.device.type, _CHUNK_ACCELERATOR) // (w.shape[-1] * candidates))


def _shares(bits: int) -> list[float]:
    """Shares of the full range, the whole first."""
    deepest = _DEEPEST.get(bits, 0.75)
    return [1.0 - (1.0 - deepest) * i / (_STEPS - 1) for i in range(_STEPS)]


def group_factors(bits: int, sym: bool, search: Search) -> list[tuple[float, float]]:
    """The ranges to try, as shares of a group's own (low, high) end; the full range first.

    Symmetric grids use one share for both ends, and its sign for the scale's.
    """
    if search == "minmax":
        return [(1.0, 1.0)]
    shares = _shares(bits)
    both = [(share, share) for share in shares]
    if sym:
        return both + [(-share, -share) for share in shares]
    one_sided = [pair for share in shares[1::2] for pair in ((1.0, share), (share, 1.0))]  # a lone outlier
    return both + one_sided


def _symmetric(w: Tensor, bits: int, scale_dtype: torch.dtype, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero [C, R, 1] of every candidate for w [R, gs]; an all-zero group gets scales as if its range were 1."""
    scale = storable_scale(_absmax(w) * (factors[:, :1, None] * (2 / ((1 << bits) - 1))), scale_dtype)
    return scale, torch.full_like(scale, 1 << (bits - 1))


def _absmax(w: Tensor) -> Tensor:
    """[R, 1]; 1 for a group of zeros."""
    absmax = w.abs().amax(-1, keepdim=True)
    return torch.where(absmax == 0, torch.ones_like(absmax), absmax)


def _full_range(w: Tensor, bits: int, scale_dtype: torch.dtype, factors: Tensor) -> tuple[Tensor, Tensor]:
    """As `_symmetric`: a step is absmax / 2^(bits-1), and the longer side of the grid is where the largest weight is."""
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    sign = torch.where(high > -low, -1.0, 1.0)
    scale = storable_scale(_absmax(w) * sign * (factors[:, :1, None] / (1 << (bits - 1))), scale_dtype)
    return scale, torch.full_like(scale, 1 << (bits - 1))


def _float_zeros(w: Tensor, bits: int, scale_dtype: torch.dtype, factors: Tensor) -> tuple[Tensor, Tensor]:
    """As `_asymmetric`, with a zero point that needs no rounding but its dtype's."""
    scale, low = _asymmetric_range(w, bits, scale_dtype, factors)
    return scale, torch.div(low, scale).neg_().clamp_(0, (1 << bits) - 1).to(scale_dtype).float()


def _asymmetric(w: Tensor, bits: int, scale_dtype: torch.dtype, factors: Tensor) -> tuple[Tensor, Tensor]:
    """As `_symmetric`. The zero point belongs to the scale that is stored, not to the ideal one."""
    scale, low = _asymmetric_range(w, bits, scale_dtype, factors)
    return scale, torch.div(low, scale).neg_().round_().clamp_(0, (1 << bits) - 1)


def _asymmetric_range(
    w: Tensor, bits: int, scale_dtype: torch.dtype, factors: Tensor
) -> tuple[Tensor, Tensor]:
    """Scale and low end [C, R, 1]. Ranges always contain zero, so that zero stays exactly representable."""
    low = w.amin(-1, keepdim=True).clamp_(max=0)
    high = w.amax(-1, keepdim=True).clamp_(min=0)
    high = torch.where(high == low, torch.ones_like(high), high)
    low = low * factors[:, :1, None]
    high = high * factors[:, 1:, None]
    return storable_scale((high - low) / ((1 << bits) - 1), scale_dtype), low


def _least(error: Tensor, costs: Tensor | None) -> Tensor:
    """int64 [1, R, 1]: for each row of squared errors [C, R, gs] the candidate whose sum is smallest."""
    if costs is not None:
        error.mul_(costs)
    return error.sum(-1, keepdim=True).argmin(0, keepdim=True)


def output_params(
    w: Tensor, moment: Tensor, bits: int, sym: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale and zero [R] of one group, w float32 [R, gs], by the error of what it adds to the output.

    Of the ranges that `group_params` tries with "mse" the one with the smallest d M d', d the weights' errors and
    M = moment, float32 [gs, gs], the second moment of the group's inputs: errors of features that go together add up
    or cancel, which a weight for each feature cannot know.
    """
    choose = _symmetric if sym else _asymmetric
    factors = w.new_tensor(group_factors(bits, sym, "mse"))
    scales, zeros = [], []
    for rows in w.split(_rows_at_once(w, len(factors))):
        scale, zero = choose(rows, bits, scale_dtype, factors)
        d = dequantize(quantize(rows, scale, zero, bits), scale, zero).sub_(rows)
        best = _least((d.flatten(0, 1) @ moment).view_as(d).mul_(d), None)
        scales.append(scale.gather(0, best)[0, :, 0])
        zeros.append(zero.gather(0, best)[0, :, 0])
    return torch.cat(scales), torch.cat(zeros)
