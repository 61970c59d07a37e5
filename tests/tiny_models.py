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


def _olmo2() -> PreTrainedConfig:
    """Norms behind attention and MLP, none before."""
    return transformers.Olmo2Config(**GATED)


def _olmo() -> PreTrainedConfig:
    """Norms without weights."""
    return transformers.OlmoConfig(**GATED)


def _phi3() -> PreTrainedConfig:
    """q/k/v and gate/up each in one linear."""
    return transformers.Phi3Config(**GATED)


def _gpt_neox() -> PreTrainedConfig:
    """q/k/v interleaved by head, attention and MLP side by side, GELU."""
    sizes = {name: value for name, value in COMMON.items() if name != "pad_token_id"}
    return transformers.GPTNeoXConfig(**sizes, intermediate_size=96, use_parallel_residual=True)


def _cohere() -> PreTrainedConfig:
    """One norm for attention and MLP."""
    return transformers.CohereConfig(**GATED)


def _bloom() -> PreTrainedConfig:
    return transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.2, **SPECIAL
    )


def _deepseek_v3() -> PreTrainedConfig:
    """Low-rank attention; experts beside a shared one behind one norm; a dense first block."""
    return transformers.DeepseekV3Config(
        **{**GATED, "num_key_value_heads": 4},
        moe_intermediate_size=32,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=32,
        q_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    )


def _qwen2_moe() -> PreTrainedConfig:
    """A shared expert behind a gate of its own."""
    return transformers.Qwen2MoeConfig(
        **GATED,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
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

# Beside those, for what depends on how a block is built: norms, fused projections, experts.
MORE_ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "olmo2": _builder(_olmo2),
    "olmo": _builder(_olmo),
    "phi3": _builder(_phi3),
    "gpt_neox": _builder(_gpt_neox),
    "bloom": _builder(_bloom),
    "cohere": _builder(_cohere),
    "deepseek_v3": _builder(_deepseek_v3),
    "qwen2_moe": _builder(_qwen2_moe),
}
