"""Tensors inside tuples, lists, dicts and dataclasses: what a block is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """`value` with every tensor in it replaced by `change(tensor)`; what is neither tensor nor container stays."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(mapped(v, change) for v in value)
    if isinstance(value, dict):
        return {name: mapped(v, change) for name, v in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        own = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
        return replace(value, **{name: mapped(v, change) for name, v in own.items()})
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in `value`, in the order that `mapped` comes to them."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(value, keep)
    return found
