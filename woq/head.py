"""The two ends of a model outside its blocks: the input embeddings and the output head, which may share one weight."""

from __future__ import annotations

from typing import Any

from torch import nn

from woq.embedding import QuantEmbedding
from woq.errors import QuantizationError


def output_head(model: Any) -> tuple[str, nn.Module]:
    """(name, module) of the model's output head. Raises QuantizationError where it has none."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head:
            return name, module
    raise QuantizationError(f"{type(model).__name__} has no output head", hint="leave quant_lm_head off")


def input_embeddings(model: Any) -> tuple[str, nn.Embedding]:
    """(name, module) of the model's input embeddings. Raises QuantizationError where they are no `nn.Embedding`."""
    embeddings = model.get_input_embeddings()
    for name, module in model.named_modules():
        if module is embeddings and isinstance(module, nn.Embedding):
            return name, module
    raise QuantizationError(
        f"the input embeddings of {type(model).__name__} are a {type(embeddings).__name__}, no nn.Embedding",
        hint="leave quant_embeddings off",
    )


def shares_embeddings(model: Any, head: Any) -> bool:
    """Whether the head's weight is the embeddings' own storage, whatever the config claims."""
    embeddings = model.get_input_embeddings()
    if embeddings is None or isinstance(embeddings, QuantEmbedding):
        return False
    ours, theirs = head.weight, embeddings.weight
    return ours is theirs or (not ours.is_meta and ours.data_ptr() == theirs.data_ptr())


def untie(model: Any, head: Any) -> bool:
    """Give the head a weight of its own and say so in the model's config; False where it has one already."""
    if not shares_embeddings(model, head):
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    return True
