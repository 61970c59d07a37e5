"""A quantized folder as one GGUF file that llama.cpp runs: metadata, tokenizer, and layers in blocks.

Layers that GGUF's blocks hold keep their codes and scales to the bit (asymmetric ones get their offset rounded to
float16); others are refused. llama.cpp's Llama wants the rows of q and k in another order: rows move with their scales,
so nothing is lost. Tensors are written one by one, to a file beside the target that is renamed when it is whole and a
sample of layers has been read back with the `gguf` package.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from woq.errors import CheckpointError, ConfigError
from woq.interop import gguf_rope
from woq.interop.convert import Source, sample
from woq.interop.gguf_blocks import block_type, to_blocks, why_not
from woq.interop.gguf_tokenizer import add_tokenizer
from woq.weights import QuantizedWeight

# transformers' model_type -> llama.cpp's architecture, and whether it wants the rows of q and k reordered
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}
_M_ERROR = 2.0**-11  # of Q4_1's offset: one rounding to float16


@dataclass(frozen=True)
class Plan:
    """What goes into the file, in order. kind: a name of gguf.GGMLQuantizationType."""

    name: str
    shape: tuple[int, ...]
    kind: str
    data: Callable[[], Tensor]


def export(source: Source, target: Path, *, overwrite: bool) -> tuple[str, ...]:
    """Write `source` to the file `target`; returns the layers that were read back. Raises CheckpointError, ConfigError."""
    if target.suffix != ".gguf":
        raise ConfigError(
            f"{target} is no name of a GGUF file", hint=f"for example {target.with_suffix('.gguf')}"
        )
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} exists", hint="pass overwrite to replace it when all is done")
    gguf, config = _gguf(), source.model_config
    if config.model_type not in ARCHITECTURES:
        raise CheckpointError(
            f"{source.folder}: model_type {config.model_type!r} is not written to GGUF",
            hint=f"these are: {', '.join(ARCHITECTURES)}",
        )
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in gguf_rope.WRITTEN:
        raise CheckpointError(
            f"{source.folder}: rope_type {kind!r} is not written to GGUF",
            hint=f"these are: {', '.join(gguf_rope.WRITTEN)}",
        )
    names = gguf.get_tensor_name_map(_architecture(gguf, config), config.num_hidden_layers)
    plans = list(_plans(source, names))
    if kind == "llama3":
        divided = gguf_rope.factors(config)
        plans.append(Plan(gguf_rope.FREQUENCIES, tuple(divided.shape), "F32", lambda: divided))
    aside = target.with_name(f"{target.name}.partial")
    aside.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write(aside, source, plans)
        checked = sample(list(source.layers))
        _check(aside, source, names, checked)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
    return checked


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("writing GGUF needs the package gguf", hint="pip install gguf") from error
    return gguf


def _architecture(gguf: Any, config: Any) -> Any:
    name = ARCHITECTURES[config.model_type][0]
    return next(arch for arch, text in gguf.MODEL_ARCH_NAMES.items() if text == name)


# --- what goes in ------------------------------------------------------------------------------------------------


def _plans(source: Source, names: Any) -> Iterator[Plan]:
    """Raises CheckpointError naming the first layer that GGUF cannot hold, and why, before anything is written."""
    for name in source.layers:
        weight = source.weight(name)
        reason = why_not(weight)
        if reason is not None:
            raise CheckpointError(f"layer {name!r} cannot be converted to gguf without loss: {reason}")
        shape = (weight.spec.out_features, weight.spec.in_features)
        yield Plan(_name(names, f"{name}.weight"), shape, block_type(weight), partial(_blocks, source, name))
        bias = source.bias(
            name, shape[0], getattr(source.model.get_submodule(name), "bias", None) is not None
        )
        if bias is not None:
            yield _float_plan(source, names, f"{name}.bias", bias)
    for name in source.floats:
        if not name.endswith("rotary_emb.inv_freq"):
            yield _float_plan(source, names, name, source.read(name))


def _blocks(source: Source, name: str) -> Tensor:
    return to_blocks(_ordered(source, name))


def _float_plan(source: Source, names: Any, name: str, tensor: Tensor) -> Plan:
    """Matrices in the dtype they have, vectors in float32, as llama.cpp wants them."""
    dtype = torch.float32 if tensor.dim() < 2 else tensor.dtype
    kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    return Plan(_name(names, name), tuple(tensor.shape), kind, lambda: _rows(source, name, tensor.to(dtype)))


def _name(names: Any, name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise CheckpointError(f"tensor {name!r} has no name in llama.cpp")
    return str(found)


def _ordered(source: Source, name: str) -> QuantizedWeight:
    """Layer `name` with its rows where llama.cpp wants them."""
    weight = source.weight(name)
    codes, scales, zeros = (_rows(source, name, t) for t in (weight.codes, weight.scales, weight.zeros))
    return replace(weight, codes=codes, scales=scales, zeros=zeros)


def _rows(source: Source, name: str, tensor: Tensor) -> Tensor:
    """transformers rotates the halves of a head, llama.cpp's Llama neighbours: row (half, i) becomes row (i, half)."""
    config = source.model_config
    if not ARCHITECTURES[config.model_type][1]:
        return tensor
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    own = next((h for part, h in heads.items() if f".{part}" in name), None)
    if own is None:
        return tensor
    halves = tensor.reshape(own, 2, tensor.shape[0] // own // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape).contiguous()


# --- the file ----------------------------------------------------------------------------------------------------


def _write(file: Path, source: Source, plans: list[Plan]) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(file, ARCHITECTURES[source.model_config.model_type][0])
    _add_metadata(writer, source, plans)
    add_tokenizer(writer, source.folder, source.model_config.vocab_size)
    for plan in plans:
        kind = gguf.GGMLQuantizationType[plan.kind]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        length = int(np.prod(plan.shape)) // block * size
        writer.add_tensor_info(plan.name, plan.shape, np.dtype(np.float32), length, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for plan in plans:
        writer.write_tensor_data(_array(plan.data()))
    for handle in writer.fout or []:
        handle.flush()
        os.fsync(handle.fileno())
    writer.close()


def _array(tensor: Tensor) -> Any:
    """A numpy array of the same bytes."""
    data = tensor.contiguous()
    return data.view(torch.uint8).numpy() if data.dtype == torch.bfloat16 else data.numpy()


def _add_metadata(writer: Any, source: Source, plans: list[Plan]) -> None:
    """The model's sizes."""
    import gguf

    config = source.model_config
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(source.folder.name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    kinds = [plan.kind for plan in plans if plan.kind.startswith("Q")]
    usual = max(dict.fromkeys(kinds), key=kinds.count)
    writer.add_file_type(int(gguf.LlamaFileType[f"MOSTLY_{usual}"]))


# --- the check ---------------------------------------------------------------------------------------------------


def _check(file: Path, source: Source, names: Any, layers: tuple[str, ...]) -> None:
    """Raises CheckpointError where a layer, read back with the gguf package, is not the source's."""
    import gguf

    reader = gguf.GGUFReader(file)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name in layers:
        weight = _ordered(source, name)
        found = tensors[_name(names, f"{name}.weight")]
        got = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type))
        allowed = torch.zeros_like(got)
        if block_type(weight) == "Q4_1":
            offsets = (weight.scales.float() * weight.zeros).abs() * _M_ERROR
            allowed = offsets.repeat_interleave(weight.spec.group_size, 1) + 1e-7 * got.abs()
        if not bool(((got - weight.dequantize()).abs() <= allowed).all()):
            raise CheckpointError(
                f"layer {name!r} of {file} reads back as something else", hint="report this"
            )
