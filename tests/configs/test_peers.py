"""transformers' config objects as ours: every parameter is honoured, or refused or warned of by name."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
import transformers

from woq.configs import (
    AutoRoundConfig,
    AwqConfig,
    ConfigWarning,
    GPTQConfig,
    QuantConfig,
    RtnConfig,
    as_config,
)
from woq.configs.aliases import IGNORED, RENAMED, TRANSLATED
from woq.errors import ConfigError

NF4 = {
    "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.bfloat16, "llm_int8_skip_modules": ["lm_head", "o_proj"],
}  # fmt: skip
TAKEN: dict[str, tuple[Any, QuantConfig]] = {
    "awq as it comes": (transformers.AwqConfig(), AwqConfig(sym=False)),
    "awq symmetric": (
        transformers.AwqConfig(bits=4, group_size=64, zero_point=False, modules_to_not_convert=["gate"]),
        AwqConfig(group_size=64, sym=True, ignore=("gate",)),
    ),
    "gptq": (
        transformers.GPTQConfig(bits=3, group_size=32, desc_act=True, act_group_aware=False, model_seqlen=64),
        GPTQConfig(bits=3, group_size=32, desc_act=True, seq_len=64, damp_percent=0.1, batch_size=1,
                   true_sequential=True),
    ),
    "autoround": (
        transformers.AutoRoundConfig(bits=3, group_size=64, sym=False),
        AutoRoundConfig(bits=3, group_size=64, sym=False),
    ),
    "bitsandbytes nf4": (
        transformers.BitsAndBytesConfig(**NF4),
        RtnConfig(group_size=64, weight_dtype="nf4", double_quant=True, double_quant_group_size=256, search="minmax",
                  compute_dtype="bf16", ignore=("lm_head", "o_proj"), on_ragged_group="smaller"),
    ),
    "bitsandbytes fp4": (
        transformers.BitsAndBytesConfig(load_in_4bit=True),
        RtnConfig(group_size=64, weight_dtype="fp4", search="minmax", on_ragged_group="smaller"),
    ),
    "bitsandbytes int8": (
        transformers.BitsAndBytesConfig(load_in_8bit=True),
        RtnConfig(bits=8, group_size=-1, search="minmax"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
def test_taken_silently(case: str) -> None:
    theirs, ours = TAKEN[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert as_config(theirs) == ours
        assert as_config(theirs.to_dict()) == ours  # and as a dict, which is what stands in JSON


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (transformers.BitsAndBytesConfig(), "load_in_4bit=False, load_in_8bit=False"),
        (
            transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True),
            "llm_int8_enable_fp32_cpu_offload=True is not possible: a quantized model runs on one device",
        ),
        (
            transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True),
            "llm_int8_has_fp16_weight=True is not possible",
        ),
        ({"load_in_4bit": True, "bnb_4bit_blocksize": 32}, r"no field \['bnb_4bit_blocksize'\]"),
        (transformers.AwqConfig(damp_percent=0.2), "AwqConfig has no field 'damp_percent'"),
        (transformers.AwqConfig(zero_point=False, sym=False), "zero_point=False contradicts sym=False"),
        (transformers.EetqConfig("int8"), "quant_method = 'eetq'; allowed: 'rtn'"),
        (object(), "quantization_config is a object"),
    ],
)
def test_refused_by_name(theirs: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        as_config(theirs)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (
            transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=4.0),
            "llm_int8_threshold=4.0",
        ),
        (
            transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16),
            "bnb_4bit_quant_storage='bfloat16' does nothing: codes are packed into 32-bit words",
        ),
        (transformers.GPTQConfig(bits=4, max_input_length=4096), "max_input_length=4096 does nothing"),
        (transformers.GPTQConfig(bits=4, backend="marlin"), "backend='marlin' does nothing"),
        (transformers.AwqConfig(version="gemv"), "(format|version)='gemv' does nothing"),
        (transformers.AutoRoundConfig(backend="triton"), "backend='triton' does nothing"),
    ],
)
def test_what_does_nothing_here_is_said(theirs: Any, message: str) -> None:
    with pytest.warns(ConfigWarning, match=message):
        assert as_config(theirs)


@pytest.mark.parametrize("argument", sorted(inspect.signature(transformers.BitsAndBytesConfig).parameters))
def test_every_argument_of_bitsandbytes_is_seen(argument: str) -> None:
    """Whatever is set to another value changes the result, warns, or is refused."""
    if argument == "kwargs":
        return
    plain = {"load_in_4bit": True}
    other = {
        "load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": 1.0, "llm_int8_skip_modules": ["x"],
        "llm_int8_enable_fp32_cpu_offload": True, "llm_int8_has_fp16_weight": True,
        "bnb_4bit_compute_dtype": "float16", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "float32",
    }[argument]  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            changed = as_config(plain | {argument: other}) != as_config(plain)
        except ConfigError:
            changed = True
    assert changed or caught


def test_every_argument_of_autoround_has_a_place() -> None:
    arguments = set(inspect.signature(transformers.AutoRoundConfig.__init__).parameters) - {"self", "kwargs"}
    assert arguments <= {*AutoRoundConfig.model_fields, *RENAMED, *TRANSLATED, *IGNORED}
