"""What a fold is: output channels of a producer divided by s > 0, the weights of whatever takes them multiplied by s.

The linears behind it then see x / s and hold W s: the same function, another rounding problem.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from woq.blocks import linears, weight_of

Form = Literal["norm", "offset norm", "rows"]


@dataclass(frozen=True, eq=False)
class Fold:
    """One rescaling: what is divided by s, and what is multiplied.

    producer:   module whose output channels `start` .. `start + channels` are divided. form: "norm", weight and bias;
                "offset norm", a norm that multiplies by 1 + weight; "rows", a linear's rows and biases
    consumers:  linears whose input it is; parameters: matrices of other modules (routers), by full name, whose last
                dimension it is
    source:     int64 [K]: which of the channels feeds each input feature of a consumer
    """

    producer: str
    form: Form
    consumers: tuple[str, ...]
    parameters: tuple[str, ...]
    start: int
    channels: int
    source: Tensor

    def shared(self, value: Tensor) -> Tensor:
        """float [K] -> [channels]: the mean over the input features that one channel feeds."""
        total = value.new_zeros(self.channels).index_add_(0, self.source, value)
        count = value.new_zeros(self.channels).index_add_(0, self.source, torch.ones_like(value))
        return total / count.clamp(min=1)

    @torch.no_grad()
    def apply(self, block: nn.Module, s: Tensor) -> Tensor:
        """Rescale `block` in place by s float32 [channels] > 0; returns the s that was applied.

        A norm's new weight is rounded to bfloat16, so that it is stored in any dtype as it is computed with here,
        and s takes up the rounding.
        """
        s = self.divide(block, s)
        features = s[self.source]
        for matrix in unique((*matrices(block, self.consumers), *parameters(block, self.parameters))):
            matrix.copy_(matrix.float() * features)
        return s

    @torch.no_grad()
    def divide(self, block: nn.Module, s: Tensor) -> Tensor:
        """The producer's half of `apply`."""
        module: Any = block.get_submodule(self.producer)
        rows = slice(self.start, self.start + self.channels)
        if self.form == "rows":
            weight = weight_of(module)[rows]
            weight.copy_(weight.float() / s.unsqueeze(-1))
        else:
            offset = 1.0 if self.form == "offset norm" else 0.0
            old = module.weight.float() + offset
            new = (old / s - offset).bfloat16().float()
            exact = old / (new + offset)
            usable = torch.isfinite(exact) & (exact > 0)  # a channel that is zero stays as it is
            s = torch.where(usable, exact, torch.ones_like(s))
            module.weight.copy_(torch.where(usable, new, module.weight.float()))
        if isinstance(getattr(module, "bias", None), Tensor):
            module.bias[rows] = (module.bias[rows].float() / s).to(module.bias.dtype)
        return s


@dataclass(frozen=True)
class Folds:
    """kept: proven, in the order of their consumers. refused: linear -> why nothing is folded into what feeds it."""

    kept: tuple[Fold, ...]
    refused: Mapping[str, str]


def matrices(block: nn.Module, names: Iterable[str]) -> list[Tensor]:
    modules = linears(block)
    return [weight_of(modules[name]) for name in names]


def parameters(block: nn.Module, names: Iterable[str]) -> list[Tensor]:
    return [block.get_parameter(name).detach() for name in names]


def unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Tied weights once."""
    return list({tensor.data_ptr(): tensor for tensor in tensors}.values())
