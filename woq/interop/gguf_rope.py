"""Scaled rotary frequencies in GGUF: how llama.cpp stores them, and what transformers' reader passes over.

Linear scaling is a factor in the metadata. Llama 3's is a tensor `rope_freqs.weight`, by which each frequency is divided;
its parameters stand nowhere. transformers reads neither for most architectures: a model would run with other
frequencies and say nothing. So they are put back here, and whatever cannot be put back is refused.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from woq.errors import CheckpointError

FREQUENCIES = "rope_freqs.weight"
WRITTEN = ("default", "linear", "llama3")
_READ_BY_TRANSFORMERS = ("gpt-oss",)
_LONG = ("rope_factors_long.weight", "rope_factors_short.weight")
# Llama 3's parameters beside the factor, as all of its releases have them; the second context is for others' copies.
_LLAMA3 = tuple(
    {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": context}
    for context in (8192, 4096)
)
_TOLERANCE = 1e-4  # relative, of a factor stored in float32


def factors(config: Any) -> Tensor:
    """float32 [head/2]: by what llama.cpp divides each frequency of a model with Llama 3's scaling."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = config.rope_parameters["rope_theta"] ** (-torch.arange(len(scaled)) / len(scaled))
    result: Tensor = plain / scaled
    return result


def restore(model: Any, file: Path) -> None:
    """Give `model`, as transformers read it from `file`, the rotary frequencies that the file says.

    Raises CheckpointError where they have no form in transformers' config.
    """
    import gguf

    reader = gguf.GGUFReader(file)
    arch = str(reader.fields["general.architecture"].contents())
    if arch in _READ_BY_TRANSFORMERS:
        return
    parameters = _stated(reader, arch, file, model.config)
    if parameters is None:
        return
    own = getattr(model.config, "rope_parameters", None)
    if not isinstance(own, dict) or "rope_theta" not in own:
        raise CheckpointError(
            f"{file}: rotary frequencies are scaled, and {arch!r} has more than one kind of them"
        )
    model.config.rope_parameters = {"rope_theta": own["rope_theta"], **parameters}
    for name, module in list(model.named_modules()):
        if hasattr(module, "inv_freq"):
            model.set_submodule(name, type(module)(model.config))


def _stated(reader: Any, arch: str, file: Path, config: Any) -> dict[str, Any] | None:
    """transformers' parameters of the scaling that a file states; None where it has none."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    kind = reader.fields.get(f"{arch}.rope.scaling.type")
    stated = "none" if kind is None else str(kind.contents())
    if stated not in ("none", "linear") or any(name in tensors for name in _LONG):
        raise CheckpointError(
            f"{file}: rotary frequencies scaled by {stated!r} are not read",
            hint="linear and Llama 3's are: take the checkpoint that the file was made from",
        )
    if FREQUENCIES in tensors:
        return _llama3(torch.from_numpy(tensors[FREQUENCIES].data.copy()).flatten(), file, config)
    if stated == "none":
        return None
    factor = reader.fields[f"{arch}.rope.scaling.factor"].contents()
    return {"rope_type": "linear", "factor": float(factor)}


def _llama3(found: Tensor, file: Path, config: Any) -> dict[str, Any]:
    """The parameters that give exactly the factors `found`."""
    from copy import deepcopy

    tried = deepcopy(config)
    theta = config.rope_parameters["rope_theta"]
    sizes = dict.fromkeys((round(float(found.max()), 4), 8.0, 32.0))
    for size, others in itertools.product(sizes, _LLAMA3):
        tried.rope_parameters = {"rope_type": "llama3", "rope_theta": theta, "factor": size, **others}
        due = factors(tried)
        if due.shape == found.shape and torch.allclose(due, found, rtol=_TOLERANCE, atol=0):
            return {name: value for name, value in tried.rope_parameters.items() if name != "rope_theta"}
    raise CheckpointError(
        f"{file}: {FREQUENCIES} divides the rotary frequencies by {found.min():.3g} to {found.max():.3g}, not as Llama 3 does",
        hint="take the checkpoint that the file was made from",
    )
