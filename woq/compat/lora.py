"""PEFT's LoRA on a `QuantLinear`: the adapter trains in float beside the packed weight, which never changes.

Registered in every `LoraConfig` by PEFT's own way for layer types it does not know, so that `get_peft_model` and
`PeftModel.from_pretrained` need nothing else. The layer is PEFT's own for GPTQ linears. What it gives up: DoRA and
merging need the float weight (`model.dequantize()` gives it), and `target_modules="all-linear"` looks for `nn.Linear`:
name the layers instead.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.gptq import GPTQLoraLinear

from woq.linear import QuantLinear


class LoraQuantLinear(GPTQLoraLinear):
    """LoRA beside one quantized linear."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features


_theirs = LoraConfig.__post_init__


def _post_init(self: Any) -> None:
    _theirs(self)  # type: ignore[no-untyped-call]
    self._register_custom_module({QuantLinear: LoraQuantLinear})


LoraConfig.__post_init__ = _post_init  # type: ignore[method-assign]
