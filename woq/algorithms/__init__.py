"""The algorithms, by the name that a config's `quant_method` gives. Adding one is one file and one line here."""

from __future__ import annotations

import importlib
from typing import Any

from woq.algorithms.base import Algorithm
from woq.configs import QuantConfig
from woq.errors import ConfigError

# quant_method -> "module:class". Loaded when asked for: running a model imports none of them.
ALGORITHMS: dict[str, str] = {
    "rtn": "woq.algorithms.rtn:Rtn",
    "gptq": "woq.algorithms.gptq:Gptq",
    "awq": "woq.algorithms.awq:Awq",
    "teq": "woq.algorithms.teq:Teq",
    "autoround": "woq.algorithms.autoround:AutoRound",
}


def build(config: QuantConfig) -> Algorithm[Any]:
    """The algorithm for `config`. Raises ConfigError where its method has none yet."""
    if config.quant_method not in ALGORITHMS:
        raise ConfigError(
            f"quant_method {config.quant_method!r} is not implemented; available: {sorted(ALGORITHMS)}"
        )
    module, _, name = ALGORITHMS[config.quant_method].partition(":")
    algorithm: Algorithm[Any] = getattr(importlib.import_module(module), name)(config)
    return algorithm
