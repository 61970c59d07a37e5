"""What will be quantized, and what not and why: settled for the whole model before any calibration starts.

Shapes decide, never values, so a model on the meta device is planned like one in memory. Group sizes that do not fit
and a coverage that is too low are errors here, in the first second, not after an hour.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from woq.blocks import Linear, linears, weight_of
from woq.configs import LayerSettings, QuantConfig, RtnConfig
from woq.errors import ConfigError, QuantizationError
from woq.moe import is_fused_experts
from woq.scales import DoubleQuant
from woq.weights import GPTQ_V1, GPTQ_V2, DataType, Layout, WeightSpec

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Plan:
    """specs: full layer name -> what it becomes. skipped: full name of every other matrix in the blocks -> reason.

    adjusted: layers whose group size is not the one asked for -> what was done. weights, covered: numbers of
    weights in the blocks' matrices, and in those that will be quantized.
    """

    specs: dict[str, WeightSpec] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    adjusted: dict[str, str] = field(default_factory=dict)
    weights: int = 0
    covered: int = 0
    embeddings: str | None = None  # the name of the input embeddings, where they are in specs

    @property
    def coverage(self) -> float:
        """Share of the blocks' weights that will be quantized."""
        return self.covered / max(self.weights, 1)

    def of_block(self, prefix: str) -> dict[str, WeightSpec]:
        """The specs of one block by the names within it; "" is the block itself."""
        inside = {n: s for n, s in self.specs.items() if n == prefix or n.startswith(f"{prefix}.")}
        return {name.removeprefix(prefix).removeprefix("."): spec for name, spec in inside.items()}


@dataclass(frozen=True)
class Choice:
    """What was chosen where bits were left to be (woq/mixed_precision.py): asked and average, in bits a weight of the blocks; widths by unit, an expert's index as "*"."""

    asked: float
    average: float
    widths: dict[str, int]


def make_plan(
    config: QuantConfig,
    path: str,
    blocks: nn.ModuleList,
    head: tuple[str, nn.Module] | None,
    embeddings: tuple[str, nn.Embedding] | None = None,
) -> Plan:
    """Plan the blocks at `path` and, where given, the output head and the input embeddings (name, module).

    Raises ConfigError for group sizes that do not fit (unless the config's `on_ragged_group` says what to do), and
    QuantizationError where less than `min_coverage` of the blocks' weights would be quantized.
    """
    plan, ragged = Plan(), list[str]()
    for i, block in enumerate(blocks):
        _plan_block(plan, ragged, config, f"{path}.{i}", block)
    if ragged and config.on_ragged_group == "error":
        listed = "\n  ".join(ragged[:20]) + ("\n  ..." if len(ragged) > 20 else "")
        raise ConfigError(
            f"group_size does not divide in_features of {len(ragged)} layers:\n  {listed}",
            hint="on_ragged_group='smaller' takes a smaller group there, 'pad' a short last group, 'skip' leaves them float",
        )
    if plan.coverage < config.min_coverage:
        reasons = "\n  ".join(f"{name}: {reason}" for name, reason in list(plan.skipped.items())[:20])
        raise QuantizationError(
            f"only {plan.coverage:.1%} of the weights in {path!r} would be quantized, min_coverage is "
            f"{config.min_coverage:.0%}; left out:\n  {reasons}",
            hint="lower min_coverage if this is what you want, or pass blocks='...' if another list holds the blocks",
        )
    if head is not None:
        _plan_alone(plan, config, "quant_lm_head", head[0], linears(head[1])[""])
    if embeddings is not None:
        plan.embeddings = embeddings[0]
        _plan_alone(plan, config, "quant_embeddings", *embeddings)
        plan.specs[plan.embeddings] = replace(plan.specs[plan.embeddings], desc_act=False)
    _settle_zero_points(plan, config)
    return plan


def _plan_block(plan: Plan, ragged: list[str], config: QuantConfig, prefix: str, block: nn.Module) -> None:
    found = linears(block)
    chosen = config.modules_in_block_to_quantize
    allowed = None if chosen is None else {name for group in chosen for name in group}
    for name, linear in found.items():
        full, weights = f"{prefix}.{name}", linear.weight.numel()
        plan.weights += weights
        settings = config.for_layer(full)
        if settings is None:
            plan.skipped[full] = config.skip_reason(full) or "left out by the configuration"
        elif allowed is not None and name not in allowed:
            plan.skipped[full] = "not in modules_in_block_to_quantize"
        elif _plan_linear(plan, ragged, config, full, linear, settings):
            plan.covered += weights
    _account_for_the_rest(plan, prefix, block)


def _plan_alone(
    plan: Plan, config: QuantConfig, field: str, name: str, module: Linear | nn.Embedding
) -> None:
    """Head and embeddings are in no block: they are planned where `field` asks for it, and coverage does not count them."""
    settings, ragged = config.for_layer(name), list[str]()
    if settings is None:
        raise ConfigError(
            f"{field} is set, but {name!r} is ignored", hint="take it out of ignore or overrides"
        )
    planned = _plan_linear(plan, ragged, config, name, module, settings)
    if ragged and (config.on_ragged_group == "error" or not planned):
        raise ConfigError(f"{field}: group_size does not divide: {ragged[0]}", hint="see on_ragged_group")


def _account_for_the_rest(plan: Plan, prefix: str, block: nn.Module) -> None:
    """Matrices that are no linear (routers, unknown expert layouts): they count, and they are named."""
    for name, module in block.named_modules():
        if isinstance(module, Linear) or is_fused_experts(module):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2 and parameter.numel() > 1:
                full = ".".join(part for part in (prefix, name, own) if part)
                plan.weights += parameter.numel()
                plan.skipped[full] = (
                    f"{list(parameter.shape)} parameter of {type(module).__name__}, no linear"
                )


def _plan_linear(
    plan: Plan,
    ragged: list[str],
    config: QuantConfig,
    name: str,
    linear: Linear | nn.Embedding,
    settings: LayerSettings,
) -> bool:
    """Add one linear's spec to the plan; False if it has to be left out."""
    out_features, in_features = weight_of(linear).shape
    asked = settings.group_size
    group_size = in_features if asked == -1 else min(asked, in_features)
    if in_features % group_size:
        ragged.append(f"{name}: in_features {in_features}, group_size {asked}")
        if config.on_ragged_group == "skip":
            plan.skipped[name] = f"group_size {asked} does not divide in_features {in_features}"
            return False
        if config.on_ragged_group == "smaller":
            group_size = _smaller_group(group_size, in_features)
            plan.adjusted[name] = f"group_size {group_size} instead of {asked}: in_features is {in_features}"
        else:
            plan.adjusted[name] = f"last group has {in_features % group_size} of {asked} features"
    plan.specs[name] = WeightSpec(
        in_features=in_features,
        out_features=out_features,
        bits=settings.bits,
        group_size=group_size,
        sym=settings.sym,
        desc_act=config.run_time_order and group_size < in_features,
        scale_dtype=DTYPES[config.scale_dtype],
        data_type=_data_type(config, settings),
        double_quant=_double_quant(config),
    )
    return True


def _data_type(config: QuantConfig, settings: LayerSettings) -> DataType:
    float_zeros = isinstance(config, RtnConfig) and config.float_zeros and not settings.sym
    return "int_float_zeros" if float_zeros else settings.weight_dtype


def _double_quant(config: QuantConfig) -> DoubleQuant | None:
    if not isinstance(config, RtnConfig) or not config.double_quant:
        return None
    return DoubleQuant(config.double_quant_bits, config.double_quant_group_size, config.double_quant_sym)


def _smaller_group(group_size: int, in_features: int) -> int:
    """The largest of group_size/2, /4, ... that divides in_features; an odd remainder ends at one whole row."""
    while group_size > 1 and in_features % group_size:
        group_size //= 2
    return group_size if group_size > 1 else in_features


def _settle_zero_points(plan: Plan, config: QuantConfig) -> None:
    """One convention a checkpoint: GPTQ v1 where all layers are symmetric, else v2 (formats.md section 9.3)."""
    if config.packing == "gptq":
        layout = GPTQ_V1 if all(s.sym for s in plan.specs.values()) else GPTQ_V2
    else:
        words = {"int8": torch.int8, "int16": torch.int16, "int32": torch.int32, "int64": torch.int64}
        layout = Layout("inc_plain", 0, words[config.compression_dtype], config.compression_dim)
    plan.specs = {name: replace(spec, layout=layout) for name, spec in plan.specs.items()}
