"""Quantized weights that gradients can move: rounding offsets and the two ends of every group's range.

All groups of one size and kind stand in one tall matrix [T, gs], whatever linear they belong to, so that a training
step costs a handful of kernels and not a handful a linear. Of every group a starting grid (scale s0, zero z0) and the
latent weights L are fixed; what is trained moves the range's ends and the rounding (SignRound, Cheng et al. 2023,
https://arxiv.org/abs/2309.05516):

    s = s0 ((m - z0) high + z0 low) / m        z = round(z0 s0 low / s)        m = 2^bits - 1
    code = clamp(round(L / s + z + offset), 0, m)                              w = s (code - z)

With low = high = 1 and offset = 0 that is the start. Symmetric groups share one factor for both ends, which leaves
z = z0. Gradients pass rounding straight through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from woq.quant import storable_scale
from woq.weights import QuantizedWeight, WeightSpec

_INSIDE = 0.499  # how far from the middle of its code's cell a latent weight may start


class _FakeQuantize(torch.autograd.Function):
    """s (clamp(round(L / s + z + offset), 0, m) - z), with straight-through gradients for offset, s and z."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, offset: Tensor, scale: Tensor, zero: Tensor, top: Tensor) -> Tensor:
        position = latent / scale
        rounded = (position + offset).add_(zero).round_()
        level = rounded.clamp(min=torch.zeros_like(top), max=top)
        inside = level == rounded
        level.sub_(zero)
        # d w / d s: the level itself where the code is clamped, else the level less the unrounded position
        ctx.save_for_backward(level - position * inside, inside, scale)
        return level.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor, Tensor, None]:
        by_scale, inside, scale = ctx.saved_tensors
        (grad,) = grads
        to_scale = (grad * by_scale).sum(1, keepdim=True)
        scaled = grad * scale
        to_offset = scaled * inside
        to_zero = (to_offset - scaled).sum(1, keepdim=True)
        return None, to_offset, to_scale, to_zero, None


# (latent, offset [T, gs], scale, zero, top [T, 1], dtype) -> weights [T, gs] in dtype
FakeQuantize = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor]


def fake_quantize(
    latent: Tensor, offset: Tensor, scale: Tensor, zero: Tensor, top: Tensor, dtype: torch.dtype
) -> Tensor:
    """s (clamp(round(L / s + z + offset), 0, m) - z), differentiable in offset, scale and zero."""
    result: Tensor = _FakeQuantize.apply(latent, offset, scale, zero, top)  # type: ignore[no-untyped-call]
    return result.to(dtype)


def plain_fake_quantize(
    latent: Tensor, offset: Tensor, scale: Tensor, zero: Tensor, top: Tensor, dtype: torch.dtype
) -> Tensor:
    """The same in plain autograd: what `torch.compile` fuses, forward and backward, and what tests hold ours against."""
    position = latent / scale + offset + zero
    rounded = _straight_through(position, position.detach().round())
    return ((torch.where(rounded < 0, 0.0, torch.where(rounded > top, top, rounded)) - zero) * scale).to(
        dtype
    )


def _straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    return value + (rounded - value).detach()


@dataclass(eq=False)
class Tunable:
    """The linears of one group size, kind of grid and scale dtype: see the module's head.

    latent, offset: float32 [T, gs]. scale0, zero0, top: float32 [T, 1]. low, high: float32 [T, 1], the same tensor for
    symmetric groups. rows: of each linear, its slice of T.
    """

    specs: dict[str, WeightSpec]
    rows: dict[str, slice]
    latent: Tensor
    scale0: Tensor
    zero0: Tensor
    top: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def start(cls, weights: Mapping[str, Tensor], begun: Mapping[str, QuantizedWeight]) -> Tunable:
        """From float weights [N, K] and what they were first rounded to, which must agree in group size and kind.

        A latent weight is the float weight where that rounds to the very code it was given, else the point nearest to
        it that does: so a start from GPTQ begins with GPTQ's codes, and those that gained least go over first.
        """
        latent, scales, zeros, tops, rows, at = [], [], [], [], {}, 0
        for name, first in begun.items():
            spec = first.spec
            fill = spec.groups * spec.group_size - spec.in_features
            scale = first.scales.float().unsqueeze(-1)
            zero = first.zeros.float().unsqueeze(-1)
            shape = (spec.out_features, spec.groups, spec.group_size)
            position = F.pad(weights[name], (0, fill)).view(shape) / scale + zero
            codes = F.pad(first.codes.float(), (0, fill)).view(shape)
            # Whatever lies beyond the last code belongs to it.
            low = torch.where(codes == 0, -torch.inf, codes - _INSIDE)
            high = torch.where(codes == (1 << spec.bits) - 1, torch.inf, codes + _INSIDE)
            kept = (torch.minimum(torch.maximum(position, low), high) - zero) * scale
            latent.append(kept.reshape(-1, spec.group_size))
            scales.append(scale.reshape(-1, 1))
            zeros.append(zero.reshape(-1, 1))
            tops.append(torch.full_like(scales[-1], (1 << spec.bits) - 1))
            rows[name] = slice(at, at + len(latent[-1]))
            at += len(latent[-1])
        flat, scale0 = torch.cat(latent), torch.cat(scales)
        high_end = torch.ones_like(scale0).requires_grad_()
        sym = next(iter(begun.values())).spec.sym
        low_end = high_end if sym else torch.ones_like(scale0).requires_grad_()
        offset = torch.zeros_like(flat).requires_grad_()
        specs = {name: first.spec for name, first in begun.items()}
        return cls(specs, rows, flat, scale0, torch.cat(zeros), torch.cat(tops), offset, low_end, high_end)

    @property
    def ends(self) -> list[Tensor]:
        """The trained factors of the ranges' ends."""
        return [self.high] if self.low is self.high else [self.low, self.high]

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero [T, 1], the scale as it will be stored."""
        stretch = ((self.top - self.zero0) * self.high + self.zero0 * self.low) / self.top
        scale = self.scale0 * stretch
        dtype = next(iter(self.specs.values())).scale_dtype
        scale = _straight_through(scale, storable_scale(scale.detach(), dtype))
        zero = self.zero0 * self.scale0 * self.low / scale
        zero = _straight_through(
            zero, zero.detach().round().clamp(min=torch.zeros_like(self.top), max=self.top)
        )
        return scale, zero

    def weights(
        self, quantizer: FakeQuantize = fake_quantize, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """[N, K] of every linear in `dtype`, differentiable."""
        flat = quantizer(self.latent, self.offset, *self.grid(), self.top, dtype)
        parts = flat.split(
            [rows.stop - rows.start for rows in self.rows.values()]
        )  # slices' gradients would be full-sized
        return {
            name: part.view(self.specs[name].out_features, -1)[:, : self.specs[name].in_features]
            for name, part in zip(self.rows, parts, strict=True)
        }

    @torch.no_grad()
    def quantized(self) -> dict[str, QuantizedWeight]:
        """Every linear as it now stands."""
        scale, zero = self.grid()
        codes = (self.latent / scale + self.offset).add_(zero).round_()
        codes = codes.clamp_(min=torch.zeros_like(self.top), max=self.top).to(torch.uint8)
        result = {}
        for name, rows in self.rows.items():
            spec = self.specs[name]
            result[name] = QuantizedWeight(
                spec=spec,
                codes=codes[rows].view(spec.out_features, -1)[:, : spec.in_features].contiguous(),
                scales=scale[rows].view(spec.out_features, spec.groups).to(spec.scale_dtype),
                zeros=zero[rows].view(spec.out_features, spec.groups).to(torch.uint8),
            )
        return result
