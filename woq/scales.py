"""Double quantization: scales as codes of a few bits, a run of them sharing a step and an offset.

    scale[i] = steps[i // group_size] * codes[i] + offsets[i // group_size]          i counts over [N, G], row by row

rounded to the dtype that a layer's scales have. Dettmers et al. 2023 (QLoRA) and llama.cpp's k-quants store scales so;
neural-compressor only rounds them and stores nothing smaller. Symmetric codes have no offset of their own: it is
-2^(bits-1) * step, so that scales of both signs are reached.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DoubleQuant:
    """How a layer's scales are stored: bits of a code; scales that share a step, -1 for all; symmetric or with offsets."""

    bits: int = 8
    group_size: int = 256
    sym: bool = False

    def groups(self, scales: int) -> int:
        """How many steps `scales` scales have."""
        return 1 if self.group_size == -1 else -(-scales // self.group_size)


@dataclass(frozen=True, eq=False)
class ScaleCodes:
    """Scales [N, G] as codes: uint8 [N, G]; steps: float32 [S]; offsets: float32 [S], None where symmetric."""

    codes: Tensor
    steps: Tensor
    offsets: Tensor | None

    def decode(self, how: DoubleQuant, dtype: torch.dtype) -> Tensor:
        """The scales [N, G] in `dtype`, computed in float32."""
        flat = self.codes.flatten()
        run = max(flat.numel(), 1) if how.group_size == -1 else how.group_size
        member = torch.arange(flat.numel(), device=flat.device) // run
        if self.offsets is None:
            scales = (flat.float() - (1 << (how.bits - 1))) * self.steps[member]
        else:
            scales = flat.float() * self.steps[member] + self.offsets[member]
        return scales.view(self.codes.shape).to(dtype)


def encode(scales: Tensor, how: DoubleQuant) -> ScaleCodes:
    """The nearest codes of `scales` [N, G]; each run's step covers its whole range."""
    flat = scales.float().flatten()
    run = flat.numel() if how.group_size == -1 else how.group_size
    count = how.groups(flat.numel())
    missing = count * run - flat.numel()
    runs = torch.cat([flat, flat[-1:].expand(missing)]).view(count, run)  # filled up without moving a range
    top = (1 << how.bits) - 1
    if how.sym:
        middle = 1 << (how.bits - 1)
        steps, offsets = runs.abs().amax(1) / (middle - 1), None
        codes = torch.div(runs, _divisor(steps)).round_().add_(middle)
    else:
        offsets = runs.amin(1)
        steps = (runs.amax(1) - offsets) / top
        codes = torch.div(runs - offsets.unsqueeze(1), _divisor(steps)).round_()
    codes = codes.clamp_(0, top).to(torch.uint8).flatten()[: flat.numel()]
    return ScaleCodes(codes.view(scales.shape), steps, offsets)


def _divisor(steps: Tensor) -> Tensor:
    """[S, 1]; a run of equal scales has step 0, and any code will do."""
    return torch.where(steps == 0, torch.ones_like(steps), steps).unsqueeze(1)
