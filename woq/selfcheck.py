"""Before a loaded model answers anything: does each kernel compute what its checkpoint says?

Every peer has shipped silent garbage from a kernel that did not match a checkpoint. One layer of every distinct
(spec, device, dtype) is run on a few random rows and compared with the dequantized weight in float32.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from woq.backends.base import Target
from woq.errors import BackendError
from woq.linear import QuantLinear
from woq.weights import WeightSpec

_ROWS = 3
# Largest norm of the error over the norm of the result: a few roundings of the activations' dtype, float32 held to what
# a tensor core's tf32 gives. A wrong zero point or a shifted nibble is off by tenths.
_TOLERANCE = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}
_INT8 = 2e-2  # activations in 127 steps: a few thousandths


def relative_error(layer: QuantLinear, target: Target) -> float:
    """||backend - reference|| / ||reference|| on a few fixed random rows.

    The activations are all positive: a zero point that is off by one then adds up over a row instead of averaging out.
    """
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(_ROWS, layer.in_features, generator=generator) + 0.5).to(target.dtype)
    bias = None if layer.bias is None else layer.bias.float().cpu()
    expected = F.linear(x.float(), layer.dequantize().cpu(), bias)
    with torch.no_grad():
        got = layer(x.to(target.device)).float().cpu()
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))


def prepare_and_check(model: nn.Module, target: Target) -> dict[str, int]:
    """Prepare every `QuantLinear` for `target`; how many layers each backend took.

    Raises BackendError naming backend, layer and error where a result is wrong.
    """
    counts: dict[str, int] = {}
    checked: set[tuple[WeightSpec, bool, str | None]] = set()
    for name, layer in _layers(model):
        layer.prepare(target)
        backend = layer.backend or ""
        counts[backend] = counts.get(backend, 0) + 1
        key = (layer.spec, layer.bias is not None, layer.compute_dtype)
        if key in checked:
            continue
        checked.add(key)
        error = relative_error(layer, target)
        tolerance = _TOLERANCE.get(target.dtype, 2e-3)
        if layer.compute_dtype == "int8":
            tolerance = max(tolerance, _INT8)
        if not error <= tolerance:
            raise BackendError(
                f"layer {name!r}: backend {backend!r} is off by {error:.3g} of the result on {target.device} in "
                f"{target.dtype}, where rounding explains {tolerance:.0e}",
                hint="pass backend='reference' and report this, with the output of `woq doctor`",
            )
    return counts


def _layers(model: nn.Module) -> Iterable[tuple[str, QuantLinear]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m, QuantLinear))
