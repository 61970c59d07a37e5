"""A training step's gradients recorded once as a CUDA graph and replayed: a small model's step is hundreds of kernels, and
to launch them from Python takes several times as long as they run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from woq.nested import mapped, tensors_in

Gradients = Callable[[Any], list[Tensor]]

_LAUNCH_BOUND = 5e12
"""Operations of a step (6 a weight and token) up to which launching it takes longer than running it: some 10 ms on an H100.

Larger steps gain nothing from a graph, which keeps the memory that it was given."""
_WARM_UP = 2  # steps by which kernels are compiled and libraries loaded, neither of which can be recorded


def recorded(gradients: Gradients, device: torch.device, weights: int, tokens: int) -> Gradients:
    """`gradients`, or what replays it: for a step over `tokens` tokens and `weights` weights on `device`."""
    small = 6.0 * weights * tokens < _LAUNCH_BOUND
    return _Recorded(gradients) if device.type == "cuda" and small else gradients


class _Recorded:
    """Calls `gradients(example)` twice, then records it, and from then on replays that for examples of the same form.

    What a call returns is overwritten by the next. Examples of another form (shapes, dtypes, anything that is not a
    tensor) are computed as ever, and so is everything, with a warning, where a step cannot be recorded.
    """

    def __init__(self, gradients: Gradients) -> None:
        self._gradients = gradients
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._form: Any = None
        self._example: Any = None  # the graph reads it
        self._found: list[Tensor] = []  # the graph writes it

    def __call__(self, example: Any) -> list[Tensor]:
        self._calls += 1
        if self._calls == _WARM_UP + 1:
            self._record(example)
        if self._graph is None or _form(example) != self._form:
            return self._gradients(example)
        for to, value in zip(tensors_in(self._example), tensors_in(example), strict=True):
            to.copy_(value)
        self._graph.replay()
        return self._found

    def _record(self, example: Any) -> None:
        self._form, self._example = _form(example), mapped(example, torch.clone)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._found = self._gradients(self._example)
        except RuntimeError as error:  # a model's own code may wait for the device, which a graph cannot
            reason = str(error).strip().split("\n")[0]
            warnings.warn(f"training runs without a CUDA graph, more slowly: {reason}", stacklevel=2)
            self._example = None
            return
        self._graph = graph


def _form(example: Any) -> Any:
    return mapped(example, lambda tensor: (tensor.shape, tensor.dtype, tensor.device))
