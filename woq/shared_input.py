"""Linears that read the same tensor, run as one product: query, key and value; gate and up.

One product of the stacked weights takes less time than several small ones, above all for a few tokens, where starting a
kernel and filling the device cost as much as the work. Which linears share an input is seen in one forward pass, not
known by name. The layers stay where they are, keep their own checkpoint tensors and are saved as before: the first of them
to be called computes for all, the others return their part. Gradients bypass this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from woq.backends import choose
from woq.backends.base import Backend, Target
from woq.linear import QuantLinear, not_traced
from woq.weights import PackedWeight, QuantizedWeight, WeightSpec


class SharedInput:
    """Layers of one parent with one input; their stacked weight in a backend's form, and the parent's current product."""

    def __init__(self, layers: Sequence[QuantLinear]) -> None:
        self.layers = tuple(layers)
        self._backend: Backend[Any] | None = None
        self._state: Any = None
        self.target: Target | None = None
        self._x: Tensor | None = None
        self._y: Tensor | None = None

    @property
    def backend(self) -> str | None:
        """The name of the backend in use; None before the first input."""
        return None if self._backend is None else self._backend.name

    def prepare(self, target: Target) -> None:
        """Stack the weights and give them to a backend. Raises BackendError where there is none."""
        packed = stacked([layer.packed for layer in self.layers], target.device)
        target = replace(target, compute_dtype=self.layers[0].compute_dtype)
        self._backend = choose(packed.spec, target, self.layers[0].requested_backend)
        self._state = self._backend.prepare(packed, target)
        self.target = target

    @not_traced
    def prepare_for(self, device: torch.device, dtype: torch.dtype) -> None:
        """Prepare unless that is done."""
        if self.target is None or self.target.device != device or self.target.dtype != dtype:
            self.prepare(Target(device, dtype))

    def output(self, x: Tensor, layer: QuantLinear) -> Tensor:
        """The part of `layer`, without its bias: x [..., in_features] -> [..., out_features], a view of the whole product."""
        if x is not self._x:
            self.prepare_for(x.device, x.dtype)
            assert self._backend is not None
            assert self.target is not None
            assert self.target.dtype == x.dtype  # as in `QuantLinear.forward`
            self._x, self._y = x, self._backend.apply(x, self._state)
        assert self._y is not None
        first = 0
        for other in self.layers:
            if other is layer:
                break
            first += other.out_features
        return self._y[..., first : first + layer.out_features]

    def release(self) -> None:
        """The parent is through with its input: another tensor may come to lie where this one was."""
        self._x = self._y = None

    def forget(self) -> None:
        """A layer has other weights now."""
        self._state = self.target = self._backend = None
        self.release()


def stacked(weights: Sequence[PackedWeight], device: torch.device) -> PackedWeight:
    """Weights that differ in out_features alone as one, [sum of N, K], rows in the order given. None has a g_idx."""
    parts = [weight.to(device).unpack() for weight in weights]
    rows = sum(part.spec.out_features for part in parts)
    return QuantizedWeight(
        spec=replace(
            parts[0].spec, out_features=rows, double_quant=None
        ),  # unpacked scales are plain numbers
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=torch.cat([part.zeros for part in parts]),
    ).pack()


def fuse_shared_inputs(model: nn.Module) -> list[list[str]]:
    """Run quantized linears that share an input as one product from now on; the names of those brought together.

    model: a causal LM, on the device that it is to run on; one forward pass of two tokens tells what shares what. Left
    apart are layers that differ in bits, group size, symmetry or data type, those with activation order, and those
    whose common parent is not called as a module. Fusing again changes nothing.
    """
    groups = find_shared_inputs(model)
    for names in groups:
        layers = [model.get_submodule(name) for name in names]
        group = SharedInput([layer for layer in layers if isinstance(layer, QuantLinear)])
        for layer in group.layers:
            layer.share(group)
        parent = model.get_submodule(names[0].rpartition(".")[0])
        parent.register_forward_hook(lambda *_, group=group: group.release())
    return groups


@torch.no_grad()
def find_shared_inputs(model: nn.Module) -> list[list[str]]:
    """Names of linears that read one tensor and can be stacked, in the order in which they were called."""
    seen: dict[tuple[str, int, WeightSpec, str, str | None], list[str]] = {}
    inputs: list[Tensor] = []  # kept alive, so that no two have one id
    called: set[nn.Module] = set()

    def look(name: str, layer: QuantLinear, x: Tensor) -> None:
        parent = name.rpartition(".")[0]
        if layer.spec.desc_act or layer.shared is not None or model.get_submodule(parent) not in called:
            return
        inputs.append(x)
        like = replace(layer.spec, out_features=1)
        key = (parent, id(x), like, layer.requested_backend, layer.compute_dtype)
        seen.setdefault(key, []).append(name)

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            hooks.append(module.register_forward_pre_hook(lambda m, args, name=name: look(name, m, args[0])))
        else:
            hooks.append(module.register_forward_pre_hook(lambda m, _: called.add(m)))
    try:
        model(torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return [names for names in seen.values() if len(names) > 1]
