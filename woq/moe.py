"""Mixture-of-experts blocks whose experts are fused 3-D parameters, taken apart into one linear per expert.

transformers 5 stores all experts of a block as `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I]. Quantizing
`nn.Linear` alone would then cover a few percent of a model and look like success. Every such class carries the flags
that transformers' own dispatch reads (`has_gate`, `has_bias`, `is_transposed`, ...), and those are all this file
reads: no per-model code. A class without the flags is left alone and shows up in the coverage report.

What it gives up: the fused grouped matrix product. Experts run one after another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_FLAGS = ("has_gate", "has_bias", "is_transposed", "num_experts", "act_fn")


def is_fused_experts(module: nn.Module) -> bool:
    """Whether `module` holds fused 3-D experts that `UnfusedExperts` computes exactly."""
    if not all(hasattr(module, flag) for flag in _FLAGS) or getattr(module, "has_post_expert_norm", False):
        return False
    up, down = module._parameters.get(_up_name(module)), module._parameters.get("down_proj")
    return up is not None and down is not None and up.dim() == down.dim() == 3


def _up_name(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _expert_linear(fused: Any, name: str, expert: int) -> nn.Linear:
    """Expert `expert` of the fused parameter `name` as a linear that shares its memory."""
    weight: Tensor = getattr(fused, name).detach()[expert]
    if fused.is_transposed:
        weight = weight.t()
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=bool(fused.has_bias), device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if fused.has_bias:
        linear.bias = nn.Parameter(getattr(fused, f"{name}_bias").detach()[expert], requires_grad=False)
    return linear


def expert_linears(fused: Any) -> dict[str, nn.Linear]:
    """The linears of a fused-experts module, named as `UnfusedExperts` names them: "0.gate_up_proj", ..."""
    return {
        f"{expert}.{name}": _expert_linear(fused, name, expert)
        for expert in range(int(fused.num_experts))
        for name in (_up_name(fused), "down_proj")
    }


class UnfusedExperts(nn.Module):
    """The same function as a fused-experts module, with one linear per expert and projection.

    `token_mask` (bool [tokens], or None) is set while calibrating: tokens that are only padding are routed to no
    expert, so that they enter no statistic.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.up_name = _up_name(fused)
        self.num_experts = int(fused.num_experts)
        self.token_mask: Tensor | None = None
        for path, linear in expert_linears(fused).items():
            expert, name = path.split(".")
            if expert not in self._modules:
                self.add_module(expert, nn.Module())
            self._modules[expert].add_module(name, linear)  # type: ignore[union-attr]
        # The emptied module stays for what it knows beside its weights: the activation and how it gates.
        fused._parameters.clear()
        self.shell = fused

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index int64 [T, k], top_k_weights [T, k] -> [T, H]."""
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            chosen = top_k_index == expert
            if self.token_mask is not None:
                chosen = chosen & self.token_mask.to(chosen.device).unsqueeze(-1)
            token, slot = torch.where(chosen)
            if token.numel() == 0:
                continue
            projections = self._modules[str(expert)]
            up = projections._modules[self.up_name](hidden_states[token])  # type: ignore[union-attr, misc]
            inner = self.shell._apply_gate(up) if self.shell.has_gate else self.shell.act_fn(up)
            out = projections._modules["down_proj"](inner)  # type: ignore[union-attr, misc]
            output.index_add_(0, token, (out * top_k_weights[token, slot, None]).to(output.dtype))
        return output


def expert_kind(name: str) -> str:
    """A linear's name in its block with indices as "*": the same for one projection of all experts."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def unfuse_experts(root: nn.Module) -> None:
    """Replace every fused-experts module below `root`, in place."""
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if is_fused_experts(child):
                setattr(parent, name, UnfusedExperts(child))
