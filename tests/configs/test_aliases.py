"""Peers' names and peers' whole configs: each name maps, each field without meaning here warns and says why."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers

from woq.configs import (
    CONFIGS,
    AutoRoundConfig,
    AwqConfig,
    ConfigWarning,
    GPTQConfig,
    QuantConfig,
    RtnConfig,
    TeqConfig,
    config_from_dict,
)
from woq.configs.aliases import IGNORED, RENAMED, TRANSLATED
from woq.errors import ConfigError

# A value that is not the default, for every field that has another name.
VALUE: dict[str, Any] = {
    "bits": 3,
    "group_size": 32,
    "sym": False,
    "weight_dtype": "int3",
    "compression_dtype": "int8",
    "ignore": ["a"],
    "quant_lm_head": True,
    "overrides": {"a": {"bits": 8}},
    "blocks": "model.layers",
    "modules_in_block_to_quantize": [["q"], ["o"]],
    "num_samples": 3,
    "seq_len": 64,
    "damp_percent": 0.5,
    "desc_act": True,
    "block_size": 64,
    "full_range": True,
    "double_quant": True,
    "double_quant_sym": True,
    "auto_scale": False,
    "auto_clip": False,
    "absorb_layer_dict": {"up": "down"},
}


def owners(field: str) -> list[type[QuantConfig]]:
    return [cls for cls in CONFIGS.values() if field in cls.model_fields]


def test_every_alias_means_a_field_and_is_none() -> None:
    targets = {*RENAMED.values(), *(field for field, _ in TRANSLATED.values())}
    assert all(owners(field) for field in targets)
    names = [*RENAMED, *TRANSLATED, *IGNORED]
    assert len(names) == len(set(names))
    assert not any(owners(name) for name in names)


@pytest.mark.parametrize("alias", RENAMED)
def test_renamed(alias: str) -> None:
    field = RENAMED[alias]
    for cls in owners(field):
        assert cls(**{alias: VALUE[field]}) == cls(**{field: VALUE[field]}) != cls()


@pytest.mark.parametrize(("alias", "theirs"), [(a, v) for a, (_, table) in TRANSLATED.items() for v in table])
def test_translated(alias: str, theirs: Any) -> None:
    field, table = TRANSLATED[alias]
    for cls in owners(field):
        assert getattr(cls(**{alias: theirs}), field) == table[theirs]


def test_translated_refuses_other_values() -> None:
    with pytest.raises(ConfigError, match=r"RtnConfig\.scheme = 'symmetric'; allowed: 'sym', 'asym'"):
        RtnConfig(scheme="symmetric")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": 4, "wbits": 3}, "bits=4 contradicts wbits=3, both set bits"),
        ({"zero_point": True, "sym": True}, "zero_point=True contradicts sym=True, both set sym"),
        ({"scheme": "sym", "zero_point": True}, "scheme='sym' contradicts zero_point=True"),
        ({"nsamples": 1, "n_samples": 2}, "nsamples=1 contradicts n_samples=2"),
    ],
)
def test_two_names_must_agree(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AwqConfig(**given)


def test_two_names_that_agree_are_fine() -> None:
    assert AwqConfig(zero_point=True, sym=False, scheme="asym", bits=3, w_bit=3) == AwqConfig(
        sym=False, bits=3
    )


def test_none_is_not_given() -> None:
    assert GPTQConfig(bits=None, scale_dtype=None, use_layer_wise=None, tokenizer=None) == GPTQConfig()


@pytest.mark.parametrize("name", IGNORED)
def test_ignored_warns_with_the_reason_where_the_caller_stands(name: str) -> None:
    reason, same = IGNORED[name]
    with pytest.warns(ConfigWarning) as caught:
        config = RtnConfig(**{name: "something else"})
    assert config == RtnConfig()
    assert reason in str(caught[0].message) and f"{name}='something else'" in str(caught[0].message)
    assert Path(caught[0].filename) == Path(__file__)
    for value in same:  # asks for what happens anyway; a warning would be an error here
        assert RtnConfig(**{name: value}) == RtnConfig()


def test_gptqmodels_dynamic() -> None:
    rules = {r"-:.*\.gate": {}, r"+:.*\.0\.": {"bits": 8, "group_size": 64}, r".*\.1\.": {"sym": False}}
    config = GPTQConfig(dynamic=rules)
    assert config.for_layer("model.layers.0.gate") is None
    assert config.for_layer("model.layers.0.up") == GPTQConfig(bits=8, group_size=64).for_layer("up")
    assert config.for_layer("model.layers.1.up") == GPTQConfig(sym=False).for_layer("up")


def test_a_flat_list_of_modules_is_one_group() -> None:
    assert GPTQConfig(inside_layer_modules=["q", "k"]).modules_in_block_to_quantize == (("q", "k"),)


INC_SHARED = {
    "bits": 4, "group_size": 32, "compute_dtype": None, "scale_dtype": None, "use_layer_wise": None,
    "quant_lm_head": False, "modules_to_not_convert": ["lm_head"], "device": "auto", "model_path": "",
}  # fmt: skip
INC_DATA = {
    **INC_SHARED, "tokenizer": None, "dataset": "NeelNanda/pile-10k", "batch_size": 8, "n_samples": 128,
    "seq_len": 2048, "weight_dtype": None,
}  # fmt: skip
PEERS: dict[str, tuple[type[QuantConfig], dict[str, Any]]] = {
    "INC RtnConfig": (RtnConfig, {**INC_SHARED, "sym": True}),
    "INC GPTQConfig": (GPTQConfig, {
        **INC_DATA, "sym": True, "blocksize": 128, "damp_percent": 0.1, "desc_act": False, "static_groups": False,
        "use_mse_search": False, "true_sequential": False}),
    "INC AwqConfig": (AwqConfig, {
        **INC_DATA, "zero_point": True, "auto_scale": True, "auto_clip": True, "absorb_layer_dict": {},
        "backend": None}),
    "INC TeqConfig": (TeqConfig, {**INC_DATA, "sym": True, "folding": False, "absorb_layer_dict": {}}),
    "INC AutoRoundConfig": (AutoRoundConfig, {
        **INC_DATA, "sym": False, "lr": None, "minmax_lr": None, "disable_quanted_input": True, "iters": 200,
        "quant_nontext_module": False, "truncation": False, "gradient_accumulate_steps": 1}),
    "INC torch RTNConfig": (RtnConfig, {
        "dtype": "int", "bits": 4, "use_sym": True, "group_size": 32, "group_dim": 1, "use_full_range": False,
        "use_mse_search": False, "use_layer_wise": True, "use_double_quant": False, "double_quant_dtype": "int",
        "double_quant_bits": 8, "double_quant_use_sym": False, "double_quant_group_size": 256,
        "quant_lm_head": False}),
    "INC torch GPTQConfig": (GPTQConfig, {
        "dtype": "int", "use_sym": True, "act_order": False, "hybrid_order": False, "fp8_aware": False,
        "percdamp": 0.01, "block_size": 2048, "static_groups": False, "use_block_wise": True}),
    "IPEX gptq": (GPTQConfig, {
        "group_size": 128, "wbits": 4, "sym": False, "percdamp": 0.01, "act_order": False, "nsamples": 128,
        "use_max_length": True, "pad_max_length": 2048, "layer_wise": True, "compression_dtype": "torch.int32",
        "compression_dim": 1, "scale_dtype": "torch.float16"}),
    "AutoAWQ": (AwqConfig, {"zero_point": True, "q_group_size": 128, "w_bit": 4}),
}  # fmt: skip


@pytest.mark.parametrize("peer", PEERS)
def test_a_peers_whole_config_is_taken_silently(peer: str) -> None:
    cls, fields = PEERS[peer]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = cls(**fields)
    for name in set(fields) & set(cls.model_fields):
        if fields[name] is not None and name not in ("compression_dtype", "scale_dtype"):
            assert getattr(config, name) == fields[name]


def test_transformers_own_gptq_config_is_taken_silently() -> None:
    theirs = transformers.GPTQConfig(bits=3, group_size=64, sym=False, model_seqlen=512).to_dict()
    config = config_from_dict(theirs)
    assert isinstance(config, GPTQConfig)
    assert (config.bits, config.group_size, config.sym, config.seq_len) == (3, 64, False, 512)
    assert (config.damp_percent, config.act_group_aware, config.true_sequential) == (0.1, True, True)


@pytest.mark.parametrize(
    ("theirs", "ours"), [(transformers.GPTQConfig, GPTQConfig), (transformers.AwqConfig, AwqConfig)]
)
def test_every_argument_of_transformers_configs_has_a_place(theirs: type, ours: type[QuantConfig]) -> None:
    arguments = set(inspect.signature(theirs.__init__).parameters) - {"self", "kwargs"}
    assert arguments <= {*ours.model_fields, *RENAMED, *TRANSLATED, *IGNORED}


@pytest.mark.parametrize("written", ["auto-round", "intel/auto-round", "autoround"])
def test_names_of_autoround(written: str) -> None:
    assert isinstance(config_from_dict({"quant_method": written}), AutoRoundConfig)
