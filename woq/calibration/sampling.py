"""Calibration text that the model writes itself: no download, and close to what the model saw in training.

Plain sampling at temperature 1 (LLM-QAT, https://arxiv.org/abs/2305.17888), in rows side by side with a key-value
cache. A document that ends is followed by a new one in the same row, so that rows are packed like real text.
All random numbers are drawn beforehand by one generator on the CPU: the global state stays as it is, and how many
rows run side by side changes nothing but rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from woq.calibration.batches import CalibrationWarning, vocabulary_size
from woq.errors import CalibrationError

OPENING_TOKENS = 4  # of each document: sampled broader, so that documents differ, and never its end
OPENING_TEMPERATURE = 1.5
MAX_ROWS = 1024
CACHE_BYTES = 4 * 2**30  # bounds the rows side by side on large models

Progress = Callable[[int, int], None]


@torch.no_grad()
def sample_from_model(
    model: nn.Module,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    openings: Tensor | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> Tensor:
    """int64 [num_samples, seq_len] on the CPU, sampled from `model`, which is left as it was.

    Rows begin with `openings` (int64 [num_samples, P], P < seq_len), which the model goes on with; without them, with the
    beginning-of-sequence token, or with random tokens where the model has none.
    `progress(done, total)` counts tokens. Raises CalibrationError where the model computes logits that are not finite.
    """
    vocab_size = vocabulary_size(model)
    if vocab_size is None:
        raise CalibrationError(f"{type(model).__name__} has no input embeddings: pass texts or token ids")
    if any(parameter.is_meta for parameter in model.parameters()):
        warnings.warn(
            "sampling calibration text from a model whose weights are offloaded reads all of them for every token; "
            "pass a list of texts or a file instead",
            CalibrationWarning,
            stacklevel=2,
        )
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(num_samples, seq_len, generator=generator)
    starts, ends = _boundaries(model, tokenizer)
    firsts = torch.randint(vocab_size, (num_samples, seq_len), generator=generator)
    if starts:
        firsts.fill_(starts[0])
    # Documents that are begun for it are past their own opening.
    begun = firsts[:, :1] if openings is None else openings
    age = 0 if openings is None else OPENING_TOKENS
    sampled = torch.empty(num_samples, seq_len, dtype=torch.int64)
    rows = min(MAX_ROWS, max(1, CACHE_BYTES // (seq_len * _cache_bytes_per_token(model))))
    was_training = model.training
    model.eval()
    try:
        for at in range(0, num_samples, rows):
            part = slice(at, at + rows)

            def report(done: int, before: int = at * seq_len) -> None:
                if progress is not None:
                    progress(before + done, sampled.numel())

            sampled[part] = _sample_rows(model, begun[part], age, uniform[part], firsts[part], ends, report)
    finally:
        model.train(was_training)
    return sampled


def _sample_rows(
    model: nn.Module,
    begun: Tensor,
    begun_age: int,
    uniform: Tensor,
    firsts: Tensor,
    ends: list[int],
    report: Callable[[int], None],
) -> Tensor:
    """Rows side by side. begun: [R, P], what they begin with, `begun_age` tokens into a document.

    uniform: float [R, L] in [0, 1), decides each draw; firsts: [R, L], begins documents.
    """
    device = _input_device(model)
    uniform, firsts, ids = uniform.to(device), firsts.to(device), begun.to(device)
    end_ids = torch.tensor(ends, dtype=torch.int64, device=device)
    age = torch.full((len(ids),), begun_age, device=device)  # tokens since the document began
    cache: Any = None
    for step in range(ids.shape[1], uniform.shape[1]):
        logits, cache = _next_logits(model, ids, cache)
        opening = (age < OPENING_TOKENS).unsqueeze(1)
        chosen = _draw(logits.to(device), opening, end_ids, uniform[:, step])
        # a document's end is its next one's beginning where one token serves as both (GPT-2, OPT)
        begins = torch.isin(ids[:, -1], end_ids) & (ids[:, -1] != firsts[:, step])
        chosen = torch.where(begins, firsts[:, step], chosen)
        age = torch.where(begins | torch.isin(chosen, end_ids), 0, age + 1)
        ids = torch.cat([ids, chosen.unsqueeze(1)], dim=1)
        report(ids.numel())
    return ids.cpu()


def _next_logits(model: nn.Module, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Logits [R, V] after `ids` [R, L]. Models that return no key-value cache read the whole row again."""
    if cache is None:
        output = model(input_ids=ids, use_cache=True)
    else:
        output = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
    logits = output.logits[:, -1].float()
    # amax: a masked vocabulary entry may be -inf; NaN, +inf and a row of nothing but -inf show in the maximum
    if not torch.isfinite(logits.amax(-1)).all():
        raise CalibrationError(
            f"the model computes logits that are not finite after {ids.shape[1]} tokens of its own text",
            hint="float16 overflows on models trained in bfloat16: load with dtype='bfloat16' or 'float32'; "
            "otherwise look for NaN in the checkpoint",
        )
    return logits, getattr(output, "past_key_values", None)


def _draw(logits: Tensor, opening: Tensor, end_ids: Tensor, uniform: Tensor) -> Tensor:
    """One token a row by inverting the cumulative distribution at `uniform` [R]."""
    if opening.any():
        logits = torch.where(opening, logits / OPENING_TEMPERATURE, logits)
        logits[:, end_ids] = logits[:, end_ids].masked_fill(opening, float("-inf"))
    cumulative = torch.softmax(logits, dim=-1).cumsum(-1)
    target = uniform.unsqueeze(1) * cumulative[:, -1:]  # the sum is 1 up to rounding only
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)


def _boundaries(model: nn.Module, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids that begin a document and ids that end one: the tokenizer's, the generation config's, the config's."""
    holders = (tokenizer, getattr(model, "generation_config", None), getattr(model, "config", None))

    def first(name: str) -> list[int]:
        for holder in holders:
            value = getattr(holder, name, None)
            if value is not None:
                return list(value) if isinstance(value, list | tuple) else [int(value)]
        return []

    return first("bos_token_id"), first("eos_token_id")


def _input_device(model: nn.Module) -> torch.device:
    """Where token ids go; offloaded models take them anywhere, their hooks move them."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def _cache_bytes_per_token(model: nn.Module) -> int:
    """Upper bound of one token's keys and values in all layers, from the config; generous where it says little."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = getattr(text, "num_hidden_layers", None) or 32
    heads = getattr(text, "num_attention_heads", None) or 32
    hidden = getattr(text, "hidden_size", None) or 4096
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    element = next((p.element_size() for p in model.parameters()), 4)
    return 2 * layers * kv_heads * head_dim * element
