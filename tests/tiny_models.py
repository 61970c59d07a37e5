"""Random models small enough for every test: real architectures from their configs, float32, the same at each call.

Every in_features is a multiple of 32; vocabularies are 128 tokens. Weights are drawn wide (0.2 instead of 0.02) so
that predictions are far from uniform and an error anywhere in a block shows in the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

VOCABULARY = 128
POSITIONS = 128
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
    **SPECIAL,
}
GATED: dict[str, Any] = {**COMMON, "intermediate_size": 96, "num_key_value_heads": 2}


def _llama() -> PreTrainedConfig:
    return transformers.LlamaConfig(**GATED)


def _gpt2() -> PreTrainedConfig:
    return transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=POSITIONS,
        initializer_range=0.2,
        **SPECIAL,
    )


def _opt() -> PreTrainedConfig:
    sizes = {name: value for name, value in COMMON.items() if name != "initializer_range"}
    return transformers.OPTConfig(**sizes, ffn_dim=128, word_embed_proj_dim=64, init_std=0.2)


def _gemma3() -> PreTrainedConfig:
    """Sliding and full attention mixed, the window shorter than any test's sequence."""
    return transformers.Gemma3TextConfig(
        **{**GATED, "num_hidden_layers": 3},
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )


def _qwen3() -> PreTrainedConfig:
    return transformers.Qwen3Config(**GATED, head_dim=16)


def _mixtral() -> PreTrainedConfig:
    return transformers.MixtralConfig(**GATED, num_local_experts=4, num_experts_per_tok=2)


def _qwen3_moe() -> PreTrainedConfig:
    """Many narrow experts behind a dense first block."""
    return transformers.Qwen3MoeConfig(
        **GATED,
        head_dim=16,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[0],
    )


def _builder(config: Callable[[], PreTrainedConfig]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = AutoModelForCausalLM.from_config(config(), dtype=torch.float32)
        return model.eval()

    return build


TINY_ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "llama": _builder(_llama),
    "gpt2": _builder(_gpt2),
    "opt": _builder(_opt),
    "gemma3": _builder(_gemma3),
    "qwen3": _builder(_qwen3),
    "mixtral": _builder(_mixtral),
    "qwen3_moe": _builder(_qwen3_moe),
}
