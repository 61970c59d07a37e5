"""`autotune`: try configs in turn until one keeps enough of the float model's score."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from woq.compat.neural_compressor.torch.quantization.config import TorchConfig, as_torch_config
from woq.compat.neural_compressor.torch.quantization.quantize import quantize
from woq.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass
class TuningConfig:
    """config_set: a config or several, whose fields may be lists. tolerable_loss: share of the float model's score that may
    be lost. max_trials: configs to try at most."""

    config_set: Any = None
    max_trials: int = 100
    tolerable_loss: float = 0.01

    def configs(self) -> list[TorchConfig]:
        """In the order in which they are tried. Raises ConfigError where there is none."""
        given = self.config_set if isinstance(self.config_set, Sequence) else [self.config_set]
        if not given or given == [None]:
            raise ConfigError("TuningConfig.config_set is empty", hint="get_woq_tuning_config()")
        every = itertools.chain.from_iterable(as_torch_config(config).expanded() for config in given)
        return list(itertools.islice(every, self.max_trials))


def autotune(
    model: Any,
    tune_config: TuningConfig,
    eval_fn: Callable[..., float],
    eval_args: Any = None,
    run_fn: Callable[..., Any] | None = None,
    run_args: Any = None,
    example_inputs: Any = None,
) -> Any:
    """The first quantized copy whose score `eval_fn(model, *eval_args)` loses no more than is tolerable; else the best.

    Higher is better. Each config quantizes a copy of `model`, calibrated by `run_fn(model, *run_args)`. Raises what
    `quantize` raises.
    """
    arguments = _as_tuple(eval_args)
    needed = eval_fn(model, *arguments) * (1 - tune_config.tolerable_loss)
    best: tuple[float, Any] | None = None
    for config in tune_config.configs():
        tried = quantize(copy.deepcopy(model), config, run_fn, run_args, example_inputs=example_inputs)
        score = eval_fn(tried, *arguments)
        log.info("%s %s: %s, %s is needed", config.name, config.to_dict(), score, needed)
        if score >= needed:
            return tried
        if best is None or score > best[0]:
            best = score, tried
    assert best is not None  # configs() holds one or more
    return best[1]


def _as_tuple(arguments: Any) -> tuple[Any, ...]:
    if arguments is None:
        return ()
    return arguments if isinstance(arguments, tuple) else (arguments,)
