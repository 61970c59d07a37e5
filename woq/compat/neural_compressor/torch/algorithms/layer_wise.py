"""`neural_compressor.torch.algorithms.layer_wise`: example scripts import it, and use it where asked to go block by block."""

from __future__ import annotations

from typing import Any

from woq.errors import ConfigError


def load_first_layer_only(model: Any, model_name: str) -> None:  # noqa: ARG001 - its signature
    """Raises ConfigError: a model of which one block is there is not quantized through `prepare`."""
    raise ConfigError(
        f"load_first_layer_only({model_name!r}) is not possible",
        hint="woq.quantize_folder(source, target, config) goes block by block from disk to disk",
    )
