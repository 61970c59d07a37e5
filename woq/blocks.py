"""The repeated blocks of a model: find them, list their linears, bring their weights in and let them go.

Nothing here knows a model by name. A block is an entry of the `nn.ModuleList` that holds most parameters; its linears
are every `nn.Linear`, transformers' `Conv1D` and every fused expert below it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from woq.errors import QuantizationError
from woq.moe import expert_linears, is_fused_experts

Linear = nn.Linear | Conv1D


def find_blocks(model: nn.Module, path: str | None = None) -> tuple[str, nn.ModuleList]:
    """The list of repeated blocks and its dotted name.

    The outermost `ModuleList` that holds most parameters, or the one at `path`. Raises QuantizationError if there is
    none.
    """
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0}
    if path is not None:
        if path not in lists:
            raise QuantizationError(
                f"blocks={path!r} is no ModuleList of {type(model).__name__}", hint=f"one of {sorted(lists)}"
            )
        return path, lists[path]
    if not lists:
        raise QuantizationError(
            f"{type(model).__name__} has no ModuleList, so no repeated blocks to quantize"
        )
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in lists.items()}
    best = max(sizes, key=lambda name: sizes[name])  # the first of equals: named_modules goes outermost first
    return best, lists[best]


def linears(block: nn.Module) -> dict[str, Linear]:
    """Every linear below `block` by its dotted name ("" for the block itself), fused experts taken apart."""
    found: dict[str, Linear] = {}
    for name, module in block.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.Linear | Conv1D):
            found[name] = module
        elif is_fused_experts(module):
            found.update({prefix + sub: linear for sub, linear in expert_linears(module).items()})
    return found


def weight_of(linear: Linear | nn.Embedding) -> Tensor:
    """The weight as [out_features, in_features]; Conv1D stores the transpose."""
    weight = linear.weight.detach()
    return weight.t() if isinstance(linear, Conv1D) else weight


def write_back(linear: Linear, weight: Tensor) -> None:
    """Put `weight` [out_features, in_features] into `linear`, in its dtype and on its device."""
    with torch.no_grad():
        linear.weight.copy_(weight.t() if isinstance(linear, Conv1D) else weight)


def materialize(block: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Bring a block's weights onto `device`: from disk where accelerate offloaded them, else by moving.

    Offload hooks are taken off, so that the weights stay until `release`.
    """
    from accelerate.hooks import AlignDevicesHook, remove_hook_from_module

    for module in block.modules():
        hook = getattr(module, "_hf_hook", None)
        if isinstance(hook, AlignDevicesHook) and hook.offload and hook.weights_map is not None:
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    value = torch.as_tensor(hook.weights_map[name])
                    module._parameters[name] = nn.Parameter(value, requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    module._buffers[name] = torch.as_tensor(hook.weights_map[name])
        if hook is not None:
            remove_hook_from_module(module)
    block.to(device=device, dtype=dtype)


@contextmanager
def borrowed(block: nn.Module, device: torch.device) -> Iterator[None]:
    """A block with its weights on `device`, and afterwards where it was: on disk again, where accelerate keeps it there."""
    from accelerate.hooks import add_hook_to_module

    hooks = [(module, module._hf_hook) for module in block.modules() if hasattr(module, "_hf_hook")]
    on_disk = [
        (m, name) for m in block.modules() for name, p in m._parameters.items() if p is not None and p.is_meta
    ]
    home = next(block.parameters()).device
    materialize(block, device)
    try:
        yield
    finally:
        if on_disk:
            for module, name in on_disk:
                value = module._parameters[name]
                assert value is not None
                module._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=False)
            for module, hook in hooks:
                add_hook_to_module(module, hook)
        else:
            block.to(home)


def release(block: nn.Module) -> None:
    """Free a block's weights: what was written to disk needs no memory any more."""
    block.to("meta")
