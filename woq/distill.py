"""Tuning end to end: scales, norms and biases of a finished model moved so that it predicts what the float model did.

Codes stay. Adam on the mean KL divergence of the next-token distributions over the calibration tokens, as in
distillation-aware weight quantization; the float model is there as the hidden states it ended with, a few bytes a
token. A batch in sixteen is held out and the best state on it kept, the start among them: scales are many enough to
learn a small calibration set by heart.

What it gives up: the whole model is in memory in float32, and trained through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from woq.calibration import Batch
from woq.linear import QuantLinear
from woq.quant import storable_scale
from woq.recording import recorded

_HELD_OUT = 16
_CHECKS = 8


class _Student(nn.Module):
    """A `QuantLinear` whose scales are trained: `factor` [N, G, 1] times what they were."""

    def __init__(self, layer: QuantLinear, device: torch.device) -> None:
        super().__init__()
        self.layer = layer
        self.start = layer.packed.to(device).unpack()
        spec = layer.spec
        fill = spec.groups * spec.group_size - spec.in_features
        order = torch.argsort(self.start.groups_of_inputs(), stable=True)
        self.order = None if self.start.g_idx is None else order
        weight = F.pad(self.start.dequantize()[:, order], (0, fill))
        self.weight = weight.view(spec.out_features, spec.groups, spec.group_size)
        self.factor = nn.Parameter(weight.new_ones(spec.out_features, spec.groups, 1))

    def forward(self, x: Tensor) -> Tensor:
        spec = self.layer.spec
        weight = (self.weight * self.factor).view(spec.out_features, -1)[:, : spec.in_features]
        return F.linear(x if self.order is None else x[..., self.order], weight, self.layer.bias)

    @torch.no_grad()
    def finished(self) -> QuantLinear:
        """The layer with its new scales, where the old one was."""
        spec = self.layer.spec
        scales = storable_scale(self.start.scales.float() * self.factor.squeeze(-1), spec.scale_dtype)
        packed = replace(self.start, scales=scales.to(spec.scale_dtype)).pack()
        return QuantLinear(
            packed.to(self.layer.packed.qweight.device),
            self.layer.bias,
            self.layer.requested_backend,
            self.layer.compute_dtype,
        )


def distill(
    model: nn.Module,
    head: nn.Module,
    batches: Sequence[Batch],
    teacher: Sequence[Tensor],
    iters: int,
    lr: float,
    seed: int,
) -> tuple[float, float]:
    """Held-out KL divergence before and after `iters` steps; the model's `QuantLinear`s are replaced.

    model: on one device, in float32. head: its output head, a float linear. teacher: [B, L, H] a batch, what the float
    model's head is given. lr: of Adam, relative to a scale; falls linearly.
    """
    device = next(model.parameters()).device
    students = {n: _Student(m, device) for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    _swap(model, students)
    small = [p for p in model.parameters() if p.dim() == 1 and p.is_floating_point()]
    trained = [*(s.factor for s in students.values()), *small]
    asked = [p.requires_grad for p in small]
    for parameter in trained:
        parameter.requires_grad_()

    def example(i: int) -> list[Any]:
        each = [batches[i].input_ids, batches[i].attention_mask, teacher[i]]
        return [None if value is None else value.to(device) for value in each]

    def gradients(example: Sequence[Any]) -> list[Tensor]:
        return list(torch.autograd.grad(_divergence(model, head, *example), trained))

    @torch.no_grad()
    def held_out_error() -> float:
        return float(torch.stack([_divergence(model, head, *example(i)) for i in held_out]).mean())

    held_out = list(range(0, len(batches), _HELD_OUT)) if len(batches) > 1 else [0]
    training = [i for i in range(len(batches)) if i not in held_out] or [0]
    weights = sum(student.weight.numel() for student in students.values())
    step = recorded(gradients, device, weights, batches[0].input_ids.numel())
    before, best = _tune(
        trained, (step(example(i)) for i in _in_turn(training, seed)), held_out_error, iters, lr
    )
    for parameter, before_that in zip(small, asked, strict=True):
        parameter.requires_grad_(before_that).grad = None
    _swap(model, {name: student.finished() for name, student in students.items()})
    return before, best


def _in_turn(training: Sequence[int], seed: int) -> Iterator[int]:
    """Batches without end, each epoch in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for i in torch.randperm(len(training), generator=generator).tolist():
            yield training[i]


def _tune(
    trained: Sequence[Tensor],
    gradients: Iterator[list[Tensor]],
    held_out_error: Callable[[], float],
    iters: int,
    lr: float,
) -> tuple[float, float]:
    """Adam, its rate falling linearly. The held-out error before and after; `trained` is left in its best state."""
    optimizer = torch.optim.Adam(trained, lr=lr, betas=(0.9, 0.99))
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / iters)
    before = best = held_out_error()
    kept = [p.detach().clone() for p in trained]
    for step in range(iters):
        for parameter, gradient in zip(trained, next(gradients), strict=True):
            parameter.grad = gradient
        optimizer.step()
        falling.step()
        if (step + 1) % max(iters // _CHECKS, 1) == 0 or step + 1 == iters:
            now = held_out_error()
            if now < best:
                best, kept = now, [p.detach().clone() for p in trained]
    with torch.no_grad():
        for parameter, value in zip(trained, kept, strict=True):
            parameter.copy_(value)
    return before, best


def _divergence(model: nn.Module, head: nn.Module, ids: Tensor, mask: Tensor | None, given: Tensor) -> Tensor:
    """Mean KL(float || quantized) over the tokens of a batch, all of it on the model's device.

    What the head is given is trained, the head itself is not.
    """
    seen: list[Tensor] = []
    handle = head.register_forward_hook(lambda _module, _args, output: seen.append(output))
    try:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        with torch.no_grad():
            target = F.log_softmax(head(given).float(), -1)
    finally:
        handle.remove()
    ours = F.log_softmax(seen[0].float(), -1)
    each = F.kl_div(ours, target, log_target=True, reduction="none").sum(-1)
    return each.mean() if mask is None else torch.where(mask.bool(), each, 0.0).sum() / mask.sum()


def _swap(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, module)
