"""Fields, refusals, layer rules and dict forms of every config class."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import woq.configs
from woq.configs import (
    CONFIGS,
    PRESETS,
    GPTQConfig,
    LayerSettings,
    QuantConfig,
    RtnConfig,
    config_from_dict,
    preset,
)
from woq.errors import ConfigError

# A valid value of every field that is not its default. `test_table_is_complete` keeps it whole.
OTHER: dict[str, Any] = {
    "bits": 3,
    "bit_choices": (3, 4),
    "group_size": 32,
    "sym": False,
    "scale_dtype": "bf16",
    "compute_dtype": "bf16",
    "compression_dtype": "int8",
    "compression_dim": 0,
    "packing": "inc_plain",
    "ignore": ("lm_head", "re:.*gate$"),
    "quant_lm_head": True,
    "quant_embeddings": True,
    "overrides": {r".*\.0\.": {"bits": 8}},
    "on_ragged_group": "pad",
    "blocks": "model.layers",
    "modules_in_block_to_quantize": (("q_proj", "k_proj"), ("o_proj",)),
    "min_coverage": 0.25,
    "device": "cuda:1",
    "dataset": "wikitext2",
    "num_samples": 3,
    "seq_len": 64,
    "batch_size": 1,
    "seed": 7,
    "tokenizer": "some/folder",
    "padding": True,
    "pad_token_id": 0,
    "true_sequential": True,
    "folding": False,
    "absorb_layer_dict": {"up_proj": ("down_proj",)},
    "iters": 10,
    "lr": 0.5,
    "search": "minmax",
    "full_range": True,
    "float_zeros": True,
    "double_quant": True,
    "double_quant_bits": 6,
    "double_quant_group_size": 8,
    "double_quant_sym": True,
    "damp_percent": 0.1,
    "desc_act": True,
    "static_groups": True,
    "act_group_aware": False,
    "block_size": 64,
    "auto_scale": False,
    "auto_clip": False,
    "minmax_lr": 0.5,
    "gradient_accumulate_steps": 2,
    "enable_quanted_input": False,
    "enable_minmax_tuning": False,
    "init": "rtn",
    "optimizer": "signsgd",
    "drift_correction": 0.5,
    "refine": 5,
    "own_samples": 3,
    "lookahead": 1,
    "distill_iters": 10,
    "distill_lr": 0.1,
    "compile": True,
}
FIXED = {"quant_method", "group_dim", "weight_dtype"}  # one value only, or (weight_dtype) one in most classes
NEEDED = {"float_zeros": {"sym": False}}  # fields without which another is refused
FREE = {"dataset", "tokenizer"}  # any object; what they hold is judged by whoever reads it
FIELDS = [(cls, name) for cls in CONFIGS.values() for name in cls.model_fields]
SETTABLE = [(cls, name) for cls, name in FIELDS if name not in FIXED]


def test_table_is_complete() -> None:
    assert {name for _, name in SETTABLE} == set(OTHER)


def test_registry_and_exports() -> None:
    assert all(cls().quant_method == name for name, cls in CONFIGS.items())
    assert all(hasattr(woq.configs, name) for name in woq.configs.__all__)


@pytest.mark.parametrize(("cls", "name"), SETTABLE)
def test_every_field_is_kept_shown_as_a_difference_and_restored(cls: type[QuantConfig], name: str) -> None:
    usual = getattr(cls(), name)
    other = (
        not usual if isinstance(usual, bool) else OTHER[name]
    )  # a flag's default may differ from class to class
    config = cls(**{name: other, **NEEDED.get(name, {})})
    assert getattr(config, name) != usual
    assert name in config.to_diff_dict()
    assert cls.from_dict(config.to_diff_dict()) == cls.from_json(config.to_json_string()) == config


@pytest.mark.parametrize(("cls", "name"), [(c, n) for c, n in FIELDS if n not in FREE])
def test_every_field_refuses_nonsense_and_says_what_it_takes(cls: type[QuantConfig], name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^{cls.__name__}\.{name} = <object object at \w+>; allowed: \S"
    ) as e:
        cls(**{name: object()})
    assert "Undefined" not in str(e.value)


WRONG = [
    ("bits", 9, "integer >= 2 and <= 8"),
    ("bits", 1, "integer >= 2 and <= 8"),
    ("bits", True, "integer >= 2 and <= 8"),
    ("bits", "4", "integer >= 2 and <= 8"),
    ("group_size", 0, "-1 or integer >= 1"),
    ("group_size", -2, "-1 or integer >= 1"),
    ("group_dim", 0, "1"),
    ("sym", "maybe", "boolean"),
    ("scale_dtype", "fp8", "'fp16', 'bf16', 'fp32'"),
    ("scale_dtype", "float64", "'fp16', 'bf16', 'fp32'"),
    ("compute_dtype", "int4", "'fp32', 'bf16', 'fp16', 'int8'"),
    ("compression_dtype", "uint8", "'int8', 'int16', 'int32', 'int64'"),
    ("compression_dim", 2, "0, 1"),
    ("packing", "awq", "'gptq', 'inc_plain'"),
    ("weight_dtype", "fp8", "'int', 'nf4', 'fp4', 'fp4_e2m1'"),
    ("on_ragged_group", "ignore", "'error', 'pad', 'smaller', 'skip'"),
    ("min_coverage", 0, "number > 0 and <= 1"),
    ("min_coverage", 1.5, "number > 0 and <= 1"),
    ("min_coverage", float("nan"), "number > 0 and <= 1"),
    ("device", "tpu", "'auto', 'cpu', 'cuda', 'xpu' or string"),
    ("device", "cuda:x", "'auto', 'cpu', 'cuda', 'xpu' or string"),
    ("ignore", "lm_head", "list of"),
    ("damp_percent", 0, "number > 0 and < 1"),
    ("damp_percent", 1, "number > 0 and < 1"),
    ("search", "grid", "'minmax', 'mse', 'activation'"),
    ("num_samples", 0, "integer >= 1"),
    ("seq_len", -1, "integer >= 1"),
    ("pad_token_id", -1, "integer >= 0"),
]


@pytest.mark.parametrize(("field", "value", "allowed"), WRONG)
def test_wrong_value_names_class_field_value_and_allowed(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError) as error:
        GPTQConfig(**{field: value})
    assert str(error.value).startswith(f"GPTQConfig.{field} = {value!r}")
    assert f"allowed: {allowed}" in str(error.value)


def test_several_mistakes_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        GPTQConfig(bits=9, group_size=0, nonsense=1)
    assert all(
        part in str(error.value) for part in ("GPTQConfig.bits", "GPTQConfig.group_size", "'nonsense'")
    )
    assert str(error.value).count("group_size =") == 1  # a union reports each arm


@pytest.mark.parametrize(
    ("cls", "key", "hint"),
    [
        (GPTQConfig, "bitz", "did you mean bits"),
        (GPTQConfig, "damp_precent", "did you mean damp_percent"),
        (RtnConfig, "use_full_rang", "did you mean use_full_range"),
        (RtnConfig, "xyzzy", "fields: quant_method, bits"),
    ],
)
def test_unknown_key_names_the_closest(cls: type[QuantConfig], key: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"{cls.__name__} has no field '{key}'") as error:
        cls(**{key: 1})
    assert error.value.hint is not None and error.value.hint.startswith(hint)


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (
            RtnConfig,
            {"packing": "gptq", "compression_dtype": "int8"},
            "allowed: packing='gptq' with compression_dtype",
        ),
        (
            RtnConfig,
            {"packing": "gptq", "compression_dim": 0},
            "allowed: packing='gptq' with compression_dtype",
        ),
        (RtnConfig, {"weight_dtype": "nf4", "bits": 3}, "weight_dtype='nf4' with bits=3 .* allowed: bits=4"),
        (
            RtnConfig,
            {"weight_dtype": "nf4", "sym": False},
            "weight_dtype='nf4' with sym=False .* no zero points",
        ),
        (
            RtnConfig,
            {"weight_dtype": "nf4", "overrides": {"a": {"bits": 8}}},
            "overrides\\['a'\\]: weight_dtype='nf4' with bits=8 .* or weight_dtype='int'",
        ),
        (RtnConfig, {"float_zeros": True}, "float_zeros=True with sym=True .* allowed: sym=False"),
        (RtnConfig, {"full_range": True, "sym": False}, "full_range=True with sym=False"),
        (RtnConfig, {"full_range": True, "weight_dtype": "fp4"}, "full_range=True with weight_dtype='fp4'"),
        (RtnConfig, {"weight_dtype": "int8", "bits": 4}, "weight_dtype='int8' contradicts bits=4"),
        (GPTQConfig, {"weight_dtype": "nf4"}, "weight_dtype='nf4' is not possible; allowed: 'int'"),
        (GPTQConfig, {"desc_act": True, "act_group_aware": True}, "desc_act=True with act_group_aware=True"),
        (GPTQConfig, {"quant_method": "rtn"}, "GPTQConfig.quant_method = 'rtn'; allowed: 'gptq'"),
        (GPTQConfig, {"overrides": {"a(": {}}}, "'a\\(' is no regular expression"),
        (
            GPTQConfig,
            {"overrides": {"a": {"bits": 9}}},
            "GPTQConfig.overrides.a.bits = 9; allowed: integer >= 2",
        ),
        (
            GPTQConfig,
            {"overrides": {"a": {"bitz": 4}}},
            "overrides.a has no field 'bitz'\nhint: did you mean bits",
        ),
        (GPTQConfig, {"ignore": ["re:("]}, "'\\(' is no regular expression"),
    ],
)
def test_contradictions_and_bad_rules(cls: type[QuantConfig], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cls(**fields)


def test_configs_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        GPTQConfig().bits = 3  # type: ignore[misc]


@pytest.mark.parametrize("word", ["int8", "int16", "int32", "int64"])
@pytest.mark.parametrize("dim", [0, 1])
def test_packing_follows_from_word_and_dimension(word: str, dim: int) -> None:
    config = RtnConfig(compression_dtype=getattr(torch, word), compression_dim=dim)
    assert config.compression_dtype == word
    assert config.packing == ("gptq" if (word, dim) == ("int32", 1) else "inc_plain")


@pytest.mark.parametrize("value", [torch.bfloat16, "torch.bfloat16", "bfloat16", "bf16", "BF16"])
def test_dtypes_by_any_name(value: Any) -> None:
    config = RtnConfig(scale_dtype=value, compute_dtype=value)
    assert (config.scale_dtype, config.compute_dtype) == ("bf16", "bf16")


def test_devices_by_any_name() -> None:
    assert [RtnConfig(device=d).device for d in (torch.device("cuda:1"), "XPU", "auto")] == [
        "cuda:1",
        "xpu",
        "auto",
    ]


def test_codebooks() -> None:
    assert RtnConfig(weight_dtype="fp4_e2m1_bnb").weight_dtype == "fp4"
    assert (RtnConfig(weight_dtype="int3").bits, RtnConfig(weight_dtype="int3").weight_dtype) == (3, "int")


def test_layer_rules() -> None:
    config = RtnConfig(
        group_size=64,
        ignore=["lm_head", "layers.1", r"re:.*\.gate$"],
        overrides={
            r".*\.2\.up": {"skip": True},
            r".*\.2\.": {"bits": 8, "sym": False},
            r".*": {"group_size": 32},
        },
    )
    assert config.for_layer("model.layers.2.down") == LayerSettings(8, 64, False)  # the first match only
    assert config.for_layer("model.layers.10.down") == LayerSettings(4, 32, True)  # no part of "layers.1"
    skipped = {
        "lm_head": "in ignore: 'lm_head'",
        "model.layers.1.up": "in ignore: 'layers.1'",
        "model.layers.10.gate": r"in ignore: 're:.*\\.gate$'",
        "model.layers.2.up": r"skipped by overrides['.*\\.2\\.up']",
    }
    for name, reason in skipped.items():
        assert config.for_layer(name) is None
        assert config.skip_reason(name) == reason
    assert config.for_layer("model.layers.10.gate_proj") is not None
    assert RtnConfig().for_layer("anything") == LayerSettings(4, 128, True)


@pytest.mark.parametrize(
    ("fields", "needed"),
    [({}, False), ({"desc_act": True}, True), ({"desc_act": True, "static_groups": True}, False),
     ({"act_group_aware": False}, False)],
)  # fmt: skip
def test_run_time_order(fields: dict[str, bool], needed: bool) -> None:
    assert GPTQConfig(**fields).run_time_order is needed
    assert not RtnConfig().run_time_order


def test_what_is_no_name_stays_out_of_dicts() -> None:
    config = GPTQConfig(dataset=["one text", "another"], tokenizer=object())
    assert config.dataset == ["one text", "another"]
    assert (config.to_dict()["dataset"], config.to_dict()["tokenizer"]) == (None, None)
    json.dumps(config.to_dict())


def test_order_of_overrides_survives_json() -> None:
    config = RtnConfig(overrides={"b": {"bits": 8}, "a": {"skip": True}})
    assert list(RtnConfig.from_json(config.to_json_string(use_diff=False)).overrides) == ["b", "a"]


@pytest.mark.parametrize("text", ["{", "[1]", '"gptq"'])
def test_json_that_is_no_config(text: str) -> None:
    with pytest.raises(ConfigError, match="a config is"):
        GPTQConfig.from_json(text)


_names = st.text("abc_.", min_size=1, max_size=6)
_overrides = st.dictionaries(
    _names.map(re.escape),
    st.fixed_dictionaries(
        {},
        optional={
            "bits": st.integers(2, 8),
            "group_size": st.just(-1) | st.integers(1, 512),
            "skip": st.booleans(),
        },
    ),
    max_size=3,
)
_shared = st.fixed_dictionaries(
    {},
    optional={
        "bits": st.integers(2, 8),
        "group_size": st.just(-1) | st.integers(1, 4096),
        "sym": st.booleans(),
        "scale_dtype": st.sampled_from(["fp16", "bf16", "fp32"]),
        "compression_dtype": st.sampled_from(["int8", "int16", "int32", "int64"]),
        "compression_dim": st.sampled_from([0, 1]),
        "ignore": st.lists(_names, max_size=3),
        "overrides": _overrides,
        "modules_in_block_to_quantize": st.lists(st.lists(_names, min_size=1, max_size=2), max_size=3),
        "min_coverage": st.floats(0.01, 1),
    },
)


@pytest.mark.parametrize("cls", CONFIGS.values())
@settings(max_examples=30, deadline=None)
@given(fields=_shared)
def test_round_trips(cls: type[QuantConfig], fields: dict[str, Any]) -> None:
    config = cls(**fields)
    assert config_from_dict(config.to_dict()) == config
    assert config_from_dict(config.to_diff_dict()) == config
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert (
        cls.from_json(config.to_json_string())
        == cls.from_json(config.to_json_string(use_diff=False))
        == config
    )


@pytest.mark.parametrize("cls", CONFIGS.values())
def test_defaults_leave_no_difference(cls: type[QuantConfig]) -> None:
    assert cls().to_diff_dict() == {"quant_method": cls().quant_method}


def test_config_from_dict_needs_a_known_method() -> None:
    for data in ({}, {"quant_method": "gguf"}, {"quant_method": ["gptq"]}):
        with pytest.raises(
            ConfigError, match=r"quant_method = .*; allowed: 'rtn', 'gptq', 'awq', 'teq', 'autoround'"
        ):
            config_from_dict(data)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str, method: str) -> None:
    config = preset(name, method)
    assert type(config) is CONFIGS[method]
    assert name == f"W{config.bits}A16"
    assert preset(name, method, group_size=16).group_size == 16


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="no preset 'W5A16'\nhint: one of W2A16"):
        preset("W5A16")


def test_optimum_dict_is_read_by_transformers_and_back() -> None:
    config = GPTQConfig(
        bits=3, group_size=64, sym=False, damp_percent=0.05, dataset="c4", batch_size=2, true_sequential=True,
        ignore=["a"], overrides={"b": {"bits": 8}, "c": {"skip": True}},
    )  # fmt: skip
    theirs = transformers.GPTQConfig.from_dict_optimum(config.to_dict_optimum())
    kept = ("bits", "group_size", "sym", "damp_percent", "dataset", "batch_size", "true_sequential")
    assert all(getattr(theirs, name) == getattr(config, name) for name in kept)
    assert config.to_dict_optimum()["dynamic"] == {"+:b": {"bits": 8}, "-:c": {}}
    assert GPTQConfig.from_dict_optimum(config.to_dict_optimum()) == config


def test_optimum_dict_leaves_out_what_optimum_refuses() -> None:
    assert "dataset" not in GPTQConfig(dataset="my.jsonl").to_dict_optimum()


def test_reading_a_config_imports_no_torch() -> None:
    package = Path(woq.configs.__file__).parents[1]
    # The package's own __init__ is left out: what it imports is its own affair.
    code = f"""
import sys, types
woq = types.ModuleType("woq"); woq.__path__ = [{str(package)!r}]; sys.modules["woq"] = woq
from woq.configs import config_from_dict
assert config_from_dict({{"quant_method": "gptq", "scale_dtype": "torch.float16"}}).scale_dtype == "fp16"
print([name for name in ("torch", "transformers", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_field_is_declared_once() -> None:
    """But for `quant_method`, which each class narrows to its own name."""
    classes = {c for cls in CONFIGS.values() for c in cls.__mro__ if issubclass(c, QuantConfig)}
    for cls in classes:
        for parent in classes - {cls}:
            if issubclass(cls, parent):
                assert set(cls.__annotations__) & set(parent.model_fields) <= {"quant_method"}
