"""The torch API's configs: its fields and defaults, settings by layer, and ours made of them.

`to_woq` is the config that quantizes. A field that has no meaning here is warned of or refused by name by our config.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import woq
from woq.configs import ConfigWarning, QuantConfig
from woq.configs.aliases import RENAMED
from woq.errors import ConfigError

FLOAT_DTYPES = ("fp32", "bf16", "fp16")  # `dtype` that leaves a layer as it is
_ALWAYS = ("use_layer_wise", "use_block_wise", "model_path")  # it goes block by block whatever they say


class TorchConfig:
    """What the five configs share. Any field of our config of the algorithm is taken too. Raises ConfigError."""

    name: ClassVar[str]
    ours: ClassVar[type[QuantConfig]]
    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, **given: Any) -> None:
        given.pop("white_list", None)  # which types of layers: linears, here as there
        self.given = {name: value for name, value in given.items() if value is not None}
        self.local: dict[Any, TorchConfig] = {}
        if not self._listed() and not self.leaves_floats:
            self.to_woq()  # what is wrong is said where it is written

    @property
    def leaves_floats(self) -> bool:
        """Whether it says that a layer is not quantized."""
        return self.given.get("dtype") in FLOAT_DTYPES

    def set_local(self, operator_name_or_type: Any, config: TorchConfig) -> Self:
        """Another config for the layers whose full name a pattern matches from its beginning, or for a type of layers."""
        if not isinstance(config, type(self)):
            raise ConfigError(
                f"set_local: a {type(config).__name__} in a {type(self).__name__}",
                hint="one algorithm for a model",
            )
        self.local[operator_name_or_type] = config
        return self

    def to_woq(self, **more: Any) -> QuantConfig:
        """Our config, with `more` of its fields where none was given. Raises ConfigError."""
        given = {name: value for name, value in self.given.items() if name not in _ALWAYS}
        if given.get("folding") is False:
            given.pop("folding")
            _warn(type(self).__name__)
        if not given.pop("use_double_quant", False):  # then its other fields say nothing
            given = {name: value for name, value in given.items() if not name.startswith("double_quant")}
        else:
            given["double_quant"] = True
        if self.leaves_floats:
            raise ConfigError(
                f"{type(self).__name__}.dtype = {self.given['dtype']!r} quantizes nothing",
                hint="for set_local",
            )
        if self.local:
            given["overrides"] = {_pattern(key): rule._rule() for key, rule in self.local.items()}
        named = {RENAMED.get(name, name) for name in given}
        filled = {name: value for name, value in {**self.defaults, **more}.items() if name not in named}
        return self.ours.from_dict({**filled, **given})

    def _rule(self) -> dict[str, Any]:
        """What `set_local` changes of a layer."""
        if self.leaves_floats:
            return {"skip": True}
        full = self.to_woq().to_dict()
        return {
            name: full[name]
            for name in ("bits", "group_size", "sym", "weight_dtype")
            if _named(name, self.given)
        }

    def expanded(self) -> Iterator[TorchConfig]:
        """One config for every combination of the fields that were given as lists, as tuning tries them."""
        listed = self._listed()
        for values in itertools.product(*listed.values()):
            one = type(self)(**{**self.given, **dict(zip(listed, values, strict=True))})
            one.local = dict(self.local)
            yield one

    def _listed(self) -> dict[str, list[Any]]:
        return {name: value for name, value in self.given.items() if isinstance(value, list)}

    def to_dict(self) -> dict[str, Any]:
        """The fields that were given."""
        return dict(self.given)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> Self:
        """The config with these fields. Raises ConfigError."""
        return cls(**config_dict)


def _named(field: str, given: Mapping[str, Any]) -> bool:
    """Whether a field of ours was given, under either name."""
    theirs = {"sym": "use_sym", "weight_dtype": "dtype"}.get(field, field)
    numbered = field == "bits" and re.fullmatch(r"int\d", str(given.get("dtype"))) is not None
    return field in given or theirs in given or numbered


def _warn(config: str) -> None:
    message = f"{config}: folding=False does nothing: there is no layer to keep scales in, they are folded where that is exact"
    warnings.warn(message, ConfigWarning, stacklevel=4)


def _pattern(key: Any) -> str:
    """A key of `set_local` as a regex: a type means every layer, since linears are all there is."""
    return key if isinstance(key, str) else ".*"


class RTNConfig(TorchConfig):
    """Round to nearest."""

    name, ours, defaults = "rtn", woq.RtnConfig, {"group_size": 32}


class GPTQConfig(TorchConfig):
    """GPTQ."""

    name, ours, defaults = "gptq", woq.GPTQConfig, {"group_size": 32}


class AWQConfig(TorchConfig):
    """AWQ. Scales are folded, where neural-compressor by default keeps them beside."""

    name, ours, defaults = "awq", woq.AwqConfig, {"group_size": 32}


class TEQConfig(TorchConfig):
    """TEQ."""

    name, ours, defaults = "teq", woq.TeqConfig, {"group_size": 32}


class AutoRoundConfig(TorchConfig):
    """AutoRound."""

    name, ours = "autoround", woq.AutoRoundConfig


CONFIGS: dict[str, type[TorchConfig]] = {
    cls.name: cls for cls in (RTNConfig, GPTQConfig, AWQConfig, TEQConfig, AutoRoundConfig)
}


def as_torch_config(given: Any) -> TorchConfig:
    """A config, or {"gptq": {...}} as neural-compressor takes it too. Raises ConfigError."""
    if isinstance(given, TorchConfig):
        return given
    if isinstance(given, Mapping) and len(given) == 1:
        ((name, fields),) = given.items()
        if name in CONFIGS and isinstance(fields, Mapping):
            return CONFIGS[name].from_dict(fields)
    raise ConfigError(
        f"quant_config is {given!r:.120}", hint=f"a config, or {{name: fields}} with one of {list(CONFIGS)}"
    )


def get_default_rtn_config(processor_type: Any = None) -> RTNConfig:  # noqa: ARG001 - its signature
    """RTN, 4 bits, groups of 32."""
    return RTNConfig()


def get_default_gptq_config(processor_type: Any = None) -> GPTQConfig:  # noqa: ARG001
    """GPTQ, 4 bits, groups of 32."""
    return GPTQConfig()


def get_default_awq_config() -> AWQConfig:
    """AWQ, 4 bits, groups of 32."""
    return AWQConfig()


def get_default_teq_config() -> TEQConfig:
    """TEQ, 4 bits, groups of 32."""
    return TEQConfig()


def get_default_AutoRound_config(processor_type: Any = None) -> AutoRoundConfig:  # noqa: ARG001
    """AutoRound, 4 bits, groups of 128."""
    return AutoRoundConfig()


def get_woq_tuning_config() -> list[TorchConfig]:
    """What `autotune` tries in this order: RTN, AutoRound, GPTQ, AWQ, all in asymmetric groups of 32."""
    return [
        RTNConfig(use_sym=False, group_size=32),
        AutoRoundConfig(use_sym=False, group_size=32, seqlen=512),
        GPTQConfig(use_sym=False, group_size=32),
        AWQConfig(use_sym=False, group_size=32),
    ]
