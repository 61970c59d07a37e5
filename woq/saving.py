"""Writing models out: what is outside the blocks, the metadata, and the small files that make a folder whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.hub import convert_file_size_to_int

from woq.blocks import find_blocks
from woq.checkpoint import quantization_dict
from woq.embedding import QuantEmbedding
from woq.errors import CheckpointError
from woq.head import output_head, shares_embeddings
from woq.linear import QuantLinear
from woq.moe import UnfusedExperts
from woq.report import Report
from woq.weights import PackedWeight
from woq.writer import SHARD_BYTES, FolderWriter, explaining, write_json

REPORT, LAYERS = "quantization_report.json", "quantization_layers.csv"

_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
)
_OTHER_FILES = ("generation_config.json", "chat_template*", "*.py")


def save_pretrained(
    model: Any,
    folder: str | Path,
    *,
    overwrite: bool = True,
    max_shard_size: int | str | None = None,
    **unused: Any,
) -> None:
    """Write a quantized model to `folder`, whole or not at all.

    Bound to models by our `from_pretrained`, in place of transformers' method. overwrite: replace what is there,
    as transformers does. max_shard_size: of a file, in bytes or as "5GB"; None: 2 GiB. Raises CheckpointError where
    the model is not quantized or the disk is full, and for arguments of transformers' method that would be ignored.
    """
    raw = getattr(model.config, "quantization_config", None)
    if raw is not None and hasattr(raw, "to_dict"):
        raw = raw.to_dict()  # loaded by transformers: a WoqConfig
    if not isinstance(raw, dict) or not any(isinstance(m, QuantLinear) for m in model.modules()):
        raise CheckpointError(
            "the model holds no quantized layer", hint="quantize it first, or use transformers to save it"
        )
    if unused:
        hint = "model.push_to_hub(repo_id)" if "push_to_hub" in unused else None
        raise CheckpointError(f"save_pretrained takes no {sorted(unused)} for a quantized model", hint=hint)
    shard_bytes = SHARD_BYTES if max_shard_size is None else int(convert_file_size_to_int(max_shard_size))
    writer = FolderWriter(Path(folder), overwrite=overwrite, shard_bytes=shard_bytes)
    try:
        writer.begin({})
        if getattr(model, "generation_config", None) is not None:
            with explaining(writer.partial):
                model.generation_config.save_pretrained(writer.partial)
        *parts, rest = _parts(_state(model), shard_bytes)
        for i, part in enumerate(parts):
            writer.write_block(i, part, {})
        writer.finish(rest, model_dict(model), raw, blocks=len(parts))
    finally:  # the model is still in memory: what was begun is worth nothing, and would block the next attempt
        shutil.rmtree(writer.partial, ignore_errors=True)


def _parts(state: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """`state` in parts of at most `size` bytes, or of one tensor that is larger."""
    parts, used = [dict[str, Tensor]()], 0
    for name, tensor in state.items():
        length = tensor.numel() * tensor.element_size()
        if parts[-1] and used + length > size:
            parts.append({})
            used = 0
        parts[-1][name] = tensor
        used += length
    return parts


def finish_folder(model: Any, report: Report, writer: FolderWriter, source: Path) -> None:
    """Add to the blocks that `writer` holds whatever makes a whole folder, and put it in place."""
    config = report.config
    path, blocks = find_blocks(model, config.blocks)
    inside = [f"{path}."] + ([f"{output_head(model)[0]}."] if config.quant_lm_head else [])
    rest = {name: t for name, t in _state(model).items() if not name.startswith(tuple(inside))}
    dtype = model.config.dtype
    packed = set(embedding_tensors(model))  # scales stay in the dtype that codes were computed for
    rest = {n: t.to(dtype) if t.is_floating_point() and n not in packed else t for n, t in rest.items()}
    copy_small_files(source, writer.partial)
    with explaining(writer.partial):
        report.write_csv(writer.partial / LAYERS)
    write_json(writer.partial / REPORT, report.to_dict())
    writer.finish(rest, model_dict(model), describe(model, report), len(blocks) + config.quant_lm_head)


def copy_small_files(source: Path, target: Path) -> None:
    """Copy what a model folder holds beside config and weights: tokenizer, chat template, generation config, code."""
    with explaining(target):
        for pattern in (*_TOKENIZER_FILES, *_OTHER_FILES):
            for file in source.glob(pattern):
                shutil.copyfile(file, target / file.name)


def embedding_tensors(model: Any) -> dict[str, Tensor]:
    """The packed tensors of quantized input embeddings by full name; none where they are float."""
    embeddings = model.get_input_embeddings()
    if not isinstance(embeddings, QuantEmbedding):
        return {}
    name = next(name for name, module in model.named_modules() if module is embeddings)
    return {f"{name}.{part}": tensor for part, tensor in embeddings.packed.tensors().items()}


def describe(model: Any, report: Report) -> dict[str, Any]:
    """The `quantization_config` of what `report` tells of."""
    linears = {name for name in report.plan.skipped if not name.endswith("weight")}
    skipped = {name: reason for name, reason in report.plan.skipped.items() if name in linears}
    unfused = any(isinstance(m, UnfusedExperts) for m in model.modules())
    return quantization_dict(
        report.config,
        report.plan.specs,
        skipped,
        report.untied_head,
        own_names=unfused,
        embeddings=report.plan.embeddings is not None,
    )


def model_dict(model: Any) -> dict[str, Any]:
    """The model's config.json without its quantization_config."""
    values: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=True))
    values.pop("quantization_config", None)
    if not values.get(
        "architectures"
    ):  # a model built from a config and never saved; readers pick its class by this
        values["architectures"] = [type(model).__name__]
    return values


def _state(model: Any) -> Mapping[str, Tensor]:
    """The model's tensors, without a head that shares the embeddings' weight: loading ties it again."""
    state: dict[str, Tensor] = dict(model.state_dict())
    head = model.get_output_embeddings()
    if isinstance(head, nn.Module) and not isinstance(head, QuantLinear) and shares_embeddings(model, head):
        state.pop(f"{output_head(model)[0]}.weight", None)
    return {name: tensor for name, tensor in state.items() if not tensor.is_meta}


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the model's float parameters."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def packed_state(
    block: nn.Module, prefix: str, packed: Mapping[str, PackedWeight], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """A block's tensors by full name as they stand in a checkpoint: packed where quantized, else floats in `dtype`."""
    state: dict[str, Tensor] = {}
    for key, value in block.state_dict().items():
        layer, _, part = key.rpartition(".")
        if layer in packed and part == "weight":
            for own, tensor in packed[layer].tensors().items():
                state[".".join(filter(None, (prefix, layer, own)))] = tensor
        else:
            state[f"{prefix}.{key}"] = value.to(dtype) if dtype and value.is_floating_point() else value
    return state


def settle_floats(block: nn.Module, packed: Mapping[str, PackedWeight], dtype: torch.dtype | None) -> bool:
    """Round what stays float (a fold may have changed it) to what `packed_state` stores: the next block and a resumed
    run see the same. Whether that changed any of it."""
    changed = False
    for key, parameter in block.named_parameters():
        layer, _, part = key.rpartition(".")
        if dtype and parameter.is_floating_point() and not (layer in packed and part == "weight"):
            settled = parameter.data.to(dtype).to(parameter.dtype)
            changed = changed or (dtype != parameter.dtype and not torch.equal(settled, parameter.data))
            parameter.data = settled
    return changed


def identity(model: nn.Module) -> dict[str, Any]:
    """What tells one model from another in a resume manifest, and what it is computed in."""
    config = getattr(model, "config", None)
    return {
        "class": type(model).__name__,
        "name": getattr(config, "_name_or_path", ""),
        "dtype": str(dtype_of(model)),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
