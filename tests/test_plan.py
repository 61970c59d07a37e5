"""The plan names everything it leaves out, and refuses before any calibration what cannot be done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.tiny_models import TINY_ARCHITECTURES
from woq.blocks import find_blocks
from woq.configs import GPTQConfig, QuantConfig, RtnConfig
from woq.errors import ConfigError, QuantizationError
from woq.head import output_head
from woq.plan import Plan, make_plan
from woq.weights import GPTQ_V1, GPTQ_V2

TinyModel = Callable[[str], nn.Module]


def plan_of(model: Any, config: QuantConfig) -> Plan:
    return make_plan(config, *find_blocks(model), output_head(model) if config.quant_lm_head else None)


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_all_but_routers_is_covered(arch: str, tiny_model: TinyModel) -> None:
    plan = plan_of(tiny_model(arch), RtnConfig(group_size=32))
    assert plan.coverage == 1.0 if not plan.skipped else 0.98 < plan.coverage < 1.0
    assert all("gate.weight" in name and "no linear" in why for name, why in plan.skipped.items())
    assert len(plan.skipped) == {"mixtral": 2, "qwen3_moe": 1}.get(arch, 0)
    assert all(spec.layout == GPTQ_V1 for spec in plan.specs.values())


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_shapes_suffice(arch: str, tiny_model: TinyModel) -> None:
    model = tiny_model(arch)
    assert plan_of(model, RtnConfig(group_size=32)) == plan_of(model.to("meta"), RtnConfig(group_size=32))


def test_low_coverage_is_an_error_with_reasons(tiny_model: TinyModel) -> None:
    """A mixture whose experts nobody recognises is 80 % untouched: never a silent success."""
    model = tiny_model("mixtral")
    with pytest.raises(
        QuantizationError, match=r"only \d+\.\d% .*min_coverage is 50%(.|\n)*experts.*in ignore: 'experts'"
    ):
        plan_of(model, RtnConfig(group_size=32, ignore=("experts",)))
    plan = plan_of(model, RtnConfig(group_size=32, ignore=("experts",), min_coverage=0.05))
    assert 0.05 < plan.coverage < 0.5


def test_unknown_experts_count_as_left_out(tiny_model: TinyModel) -> None:
    model = tiny_model("mixtral")
    for module in model.modules():
        if hasattr(module, "is_transposed"):
            del module.is_transposed
    with pytest.raises(QuantizationError, match=r"gate_up_proj.*no linear"):
        plan_of(model, RtnConfig(group_size=32))


# --- group sizes -------------------------------------------------------------------------------------------------


def test_ragged_groups_follow_the_policy(tiny_model: TinyModel) -> None:
    """llama's down_proj has 96 features: 64 does not divide them."""
    model = tiny_model("llama")
    with pytest.raises(
        ConfigError,
        match=r"group_size does not divide in_features of 2 layers:\n.*layers\.0\.mlp\.down_proj: in_features 96, group_size 64",
    ) as error:
        plan_of(model, RtnConfig(group_size=64))
    for policy in ("smaller", "pad", "skip"):
        assert error.value.hint is not None
        assert f"'{policy}'" in error.value.hint
    down = "model.layers.0.mlp.down_proj"
    smaller = plan_of(model, RtnConfig(group_size=64, on_ragged_group="smaller"))
    assert smaller.specs[down].group_size == 32
    assert "group_size 32 instead of 64" in smaller.adjusted[down]
    padded = plan_of(model, RtnConfig(group_size=64, on_ragged_group="pad"))
    assert (padded.specs[down].group_size, padded.specs[down].groups) == (64, 2)
    assert "last group has 32 of 64" in padded.adjusted[down]
    skipped = plan_of(model, RtnConfig(group_size=64, on_ragged_group="skip"))
    assert down not in skipped.specs
    assert "does not divide" in skipped.skipped[down]
    for plan in (smaller, padded, skipped):
        assert len(plan.adjusted) in (0, 2)
        assert plan.specs["model.layers.0.mlp.up_proj"].group_size == 64


def test_groups_never_exceed_the_row(tiny_model: TinyModel) -> None:
    for asked in (-1, 128, 4096):
        specs = plan_of(tiny_model("llama"), RtnConfig(group_size=asked)).specs
        assert {spec.group_size for spec in specs.values()} == {64, 96}
        assert all(spec.groups == 1 for spec in specs.values())


def test_ragged_head(tiny_model: TinyModel) -> None:
    head = nn.Linear(48, 128)
    model = tiny_model("llama")
    model.lm_head = head
    with pytest.raises(ConfigError, match=r"quant_lm_head: .*: lm_head: in_features 48, group_size 32"):
        plan_of(model, RtnConfig(group_size=32, quant_lm_head=True))


# --- rules -------------------------------------------------------------------------------------------------------


def test_rules_by_module(tiny_model: TinyModel) -> None:
    config = RtnConfig(
        group_size=32,
        ignore=("o_proj", r"re:.*layers\.1\.mlp\.up"),
        overrides={r".*v_proj": {"bits": 8, "group_size": -1}, r".*q_proj": {"skip": True}},
    )
    plan = plan_of(tiny_model("llama"), config)
    assert plan.skipped == {
        "model.layers.0.self_attn.q_proj": "skipped by overrides['.*q_proj']",
        "model.layers.0.self_attn.o_proj": "in ignore: 'o_proj'",
        "model.layers.1.self_attn.q_proj": "skipped by overrides['.*q_proj']",
        "model.layers.1.self_attn.o_proj": "in ignore: 'o_proj'",
        "model.layers.1.mlp.up_proj": r"in ignore: 're:.*layers\\.1\\.mlp\\.up'",
    }
    value = plan.specs["model.layers.1.self_attn.v_proj"]
    assert (value.bits, value.group_size) == (8, 64)
    assert plan.specs["model.layers.1.self_attn.k_proj"].bits == 4


def test_modules_in_block(tiny_model: TinyModel) -> None:
    named = (("self_attn.q_proj",), ("mlp.up_proj", "mlp.down_proj", "mlp.gate_proj"))
    plan = plan_of(tiny_model("llama"), RtnConfig(group_size=32, modules_in_block_to_quantize=named))
    assert len(plan.specs) == 8
    assert plan.skipped["model.layers.0.self_attn.k_proj"] == "not in modules_in_block_to_quantize"


def test_head(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    assert "lm_head" not in plan_of(model, RtnConfig(group_size=32)).specs
    plan = plan_of(model, RtnConfig(group_size=32, quant_lm_head=True))
    assert plan.specs["lm_head"].out_features == 128
    assert set(plan.of_block("lm_head")) == {""}
    with pytest.raises(ConfigError, match="quant_lm_head is set, but 'lm_head' is ignored"):
        plan_of(model, RtnConfig(group_size=32, quant_lm_head=True, ignore=("lm_head",)))


# --- what a checkpoint can say -----------------------------------------------------------------------------------


def test_one_zero_point_convention_a_folder(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    mixed = RtnConfig(group_size=32, overrides={r".*v_proj": {"sym": False}})
    for config, layout in (
        (RtnConfig(group_size=32), GPTQ_V1),
        (RtnConfig(group_size=32, sym=False), GPTQ_V2),
        (mixed, GPTQ_V2),
    ):
        assert {spec.layout for spec in plan_of(model, config).specs.values()} == {layout}
    plain = plan_of(model, RtnConfig(group_size=32, compression_dtype="int16", compression_dim=0))
    layout = next(iter(plain.specs.values())).layout
    assert (layout.packing, layout.compression_dtype, layout.compression_dim) == ("inc_plain", torch.int16, 0)


def test_g_idx_only_where_groups_are_reordered(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    for config, expected in (
        (GPTQConfig(group_size=32, desc_act=True), True),
        (GPTQConfig(group_size=-1, desc_act=True), False),
        (GPTQConfig(group_size=32, desc_act=True, static_groups=True), False),
        (GPTQConfig(group_size=32, act_group_aware=True), False),
        (GPTQConfig(group_size=32), False),
    ):
        assert {spec.desc_act for spec in plan_of(model, config).specs.values()} == {expected}
