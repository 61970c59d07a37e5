"""GPTQ (Frantar et al., 2022): rounding errors are compensated by the weights not yet rounded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from woq.configs.base import CalibratedConfig
from woq.configs.types import Count

# Our field -> the name that optimum's GPTQ config and transformers' GPTQConfig know it by.
_OPTIMUM = {
    "quant_method": "quant_method",
    "bits": "bits",
    "group_size": "group_size",
    "sym": "sym",
    "damp_percent": "damp_percent",
    "desc_act": "desc_act",
    "act_group_aware": "act_group_aware",
    "true_sequential": "true_sequential",
    "dataset": "dataset",
    "tokenizer": "tokenizer",
    "seq_len": "model_seqlen",
    "batch_size": "batch_size",
    "pad_token_id": "pad_token_id",
    "blocks": "block_name_to_quantize",
    "modules_in_block_to_quantize": "modules_in_block_to_quantize",
    "ignore": "modules_to_not_convert",
}
_OPTIMUM_DATASETS = ("wikitext2", "c4", "c4-new")


class GPTQConfig(CalibratedConfig):
    """GPTQ."""

    quant_method: Literal["gptq"] = "gptq"
    damp_percent: float = Field(0.01, gt=0, lt=1)
    """Share of the Hessian's mean diagonal that is added to its diagonal; raised for a layer that needs it."""
    desc_act: bool = False
    """Round columns in order of falling activation; groups then need a g_idx at run time."""
    static_groups: bool = False
    """Fix every group's scale before rounding starts, so that desc_act needs no g_idx."""
    act_group_aware: bool = Field(default_factory=lambda data: not data.get("desc_act", False))
    """Reorder whole groups and columns inside groups only: most of desc_act's gain, no g_idx."""
    block_size: Count = 128
    """Columns rounded before their error is applied to all later ones; speed only."""
    search: Literal["minmax", "mse", "activation"] = "activation"
    """Scale and zero of a group: the whole range, least squared weight error, or that weighted by the Hessian's
    diagonal."""
    drift_correction: float = Field(0.75, ge=0, le=1)
    """Share of what the linears before have done to a linear's inputs that it makes up for; 0 is the paper's GPTQ."""
    refine: int = Field(2, ge=0, strict=True)
    """After rounding: times to solve for the best scales with the codes frozen, then sweep the codes once more."""

    @model_validator(mode="after")
    def _one_order(self) -> Self:
        if self.desc_act and self.act_group_aware:
            raise self._refusal(
                "desc_act=True with act_group_aware=True", "one of the two, they order columns"
            )
        return self

    @property
    def run_time_order(self) -> bool:
        """desc_act forms its groups after reordering, unless they were fixed before."""
        return self.desc_act and not self.static_groups

    def to_dict_optimum(self) -> dict[str, Any]:
        """The fields that optimum knows, under its names; what it would refuse (its data sets are three) is left out.

        optimum has no per-layer rules of its own; they go under GPTQModel's `dynamic`, which it passes on.
        """
        ours = self.to_dict()
        theirs = {name: ours[field] for field, name in _OPTIMUM.items() if ours[field] not in (None, [])}
        if theirs.get("dataset") not in _OPTIMUM_DATASETS:
            theirs.pop("dataset", None)
        if self.overrides:
            theirs["dynamic"] = {
                f"-:{pattern}" if rule.skip else f"+:{pattern}": rule.model_dump(
                    exclude_none=True, exclude={"skip"}
                )
                for pattern, rule in self.overrides.items()
            }
        return theirs

    @classmethod
    def from_dict_optimum(cls, data: Mapping[str, Any]) -> Self:
        """The config that optimum or transformers wrote: their names are aliases here. Raises ConfigError."""
        return cls.from_dict(data)
