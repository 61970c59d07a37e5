"""`neural_compressor.transformers`: its configs with its defaults, and its `AutoModelForCausalLM`.

The configs are calls that return ours. Their defaults differ from ours in what is listed in `_DEFAULTS`.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import woq
from woq.configs import ConfigWarning, QuantConfig
from woq.configs.aliases import RENAMED, TRANSLATED
from woq.errors import ConfigError
from woq.interop import find
from woq.loading import resolve_folder

__all__ = ["AutoModel", "AutoModelForCausalLM", "AwqConfig", "GPTQConfig", "RtnConfig", "TeqConfig"]

log = logging.getLogger(__name__)

_DATASET = "NeelNanda/pile-10k"
_DEFAULTS: dict[type[QuantConfig], dict[str, Any]] = {
    woq.RtnConfig: {"group_size": 32},
    woq.GPTQConfig: {"group_size": 32, "damp_percent": 0.1, "dataset": _DATASET},
    woq.AwqConfig: {"group_size": 32, "sym": False, "dataset": _DATASET},
    woq.TeqConfig: {"group_size": 32, "dataset": _DATASET},
}
_NUMBERED = {"int4": 4, "int8": 8}


def _config(ours: type[QuantConfig], given: dict[str, Any]) -> Any:
    """Our config of neural-compressor's arguments. Its `weight_dtype` names bits a second time, and `bits` wins there."""
    given = {name: value for name, value in given.items() if value is not None}
    named = _NUMBERED.get(given.get("weight_dtype", ""))
    if named is not None:
        del given["weight_dtype"]
        if given.get("bits", 4) != named:
            warnings.warn(
                f"{ours.__name__}: weight_dtype='int{named}' does nothing beside bits={given.get('bits', 4)}",
                ConfigWarning,
                stacklevel=3,
            )
    if given.get("folding") is False:
        del given["folding"]  # its default: to keep scales in a layer beside, which is not here
    known = {TRANSLATED[name][0] if name in TRANSLATED else RENAMED.get(name, name) for name in given}
    defaults = {name: value for name, value in _DEFAULTS[ours].items() if name not in known}
    return ours.from_dict({**defaults, **given})


def RtnConfig(bits: int = 4, group_size: int = 32, **given: Any) -> woq.RtnConfig:
    """Round to nearest, groups of 32. Raises ConfigError."""
    return _config(woq.RtnConfig, {"bits": bits, "group_size": group_size, **given})  # type: ignore[no-any-return]


def GPTQConfig(bits: int = 4, tokenizer: Any = None, **given: Any) -> woq.GPTQConfig:
    """GPTQ, groups of 32, damping 0.1, calibrated on NeelNanda/pile-10k unless `dataset` says otherwise. Raises ConfigError."""
    return _config(woq.GPTQConfig, {"bits": bits, "tokenizer": tokenizer, **given})  # type: ignore[no-any-return]


def AwqConfig(bits: int = 4, tokenizer: Any = None, **given: Any) -> woq.AwqConfig:
    """AWQ, groups of 32, asymmetric (`zero_point=True`). Raises ConfigError."""
    return _config(woq.AwqConfig, {"bits": bits, "tokenizer": tokenizer, **given})  # type: ignore[no-any-return]


def TeqConfig(bits: int = 4, tokenizer: Any = None, **given: Any) -> woq.TeqConfig:
    """TEQ, groups of 32. Scales are folded, where neural-compressor by default keeps them beside. Raises ConfigError."""
    return _config(woq.TeqConfig, {"bits": bits, "tokenizer": tokenizer, **given})  # type: ignore[no-any-return]


class AutoModelForCausalLM:
    """Loads a causal LM: quantized already, to be quantized now, or plain."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        quantization_config: Any = None,
        for_inference: bool = True,  # noqa: ARG003 - our layers run and save in one form
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        torch_dtype: Any = "auto",
        **options: Any,
    ) -> Any:
        """As `woq.AutoModelForCausalLM.from_pretrained`, with neural-compressor's arguments.

        A folder that is quantized is loaded, whatever `quantization_config` says, as there. load_in_4bit, load_in_8bit:
        round to nearest with `RtnConfig`'s defaults. `_commit_hash` is `revision`. Raises the errors of `woq.errors`.
        """
        commit = options.pop("_commit_hash", None)
        if commit is not None:
            options["revision"] = commit
        options.pop("low_cpu_mem_usage", None)  # a float model is read block by block where memory is short
        if load_in_4bit or load_in_8bit:
            if quantization_config is not None or (load_in_4bit and load_in_8bit):
                raise ConfigError(
                    "load_in_4bit, load_in_8bit and quantization_config", hint="one of the three"
                )
            quantization_config = RtnConfig(bits=4 if load_in_4bit else 8)
        hub = {name: options[name] for name in _HUB if name in options}
        folder = resolve_folder(pretrained_model_name_or_path, hub)
        if quantization_config is not None and find(folder) is not None:
            log.info("%s is quantized already: quantization_config is not looked at", folder)
            quantization_config = None
        return woq.AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=quantization_config,
            dtype=torch_dtype,
            **{name: value for name, value in options.items() if name not in hub},
        )


_HUB = ("revision", "token", "cache_dir", "local_files_only")
AutoModel = AutoModelForCausalLM  # scripts take it for ChatGLM, a causal LM under another name
