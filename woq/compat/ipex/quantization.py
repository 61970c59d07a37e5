"""`ipex.quantization.gptq`: quantize a model, and write the checkpoint that `ipex.llm.optimize` loads.

The same arguments as IPEX's, our GPTQ, its file. Beside the file stands a config.json, which
`ipex.llm.utils.load_low_precision_checkpoint` asks for and IPEX itself never wrote; with it our own `from_pretrained` loads the folder too.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from woq.compat.samples import windows
from woq.configs import GPTQConfig
from woq.errors import CheckpointError, ConfigError
from woq.interop.ipex import file_name, to_tensors, why_not
from woq.linear import QuantLinear
from woq.quantization import quantize
from woq.saving import model_dict
from woq.tensor_files import CONFIG
from woq.writer import explaining, write_json

log = logging.getLogger(__name__)


def gptq(  # noqa: PLR0913 - IPEX's signature
    model: Any,
    dataloader: Any,
    group_size: int = 128,
    wbits: int = 4,
    sym: bool = False,
    percdamp: float = 0.01,
    act_order: bool = False,
    nsamples: int = 128,
    use_max_length: bool = False,
    pad_max_length: int = 2048,
    layer_wise: bool = False,  # noqa: ARG001 - it always goes block by block
    compression_dtype: torch.dtype = torch.int32,
    compression_dim: int = 1,
    scale_dtype: torch.dtype = torch.float16,
    save_dir: str | os.PathLike[str] = "saved_results",
    *,
    saved_dir: str | os.PathLike[str] | None = None,
) -> Any:
    """Quantize `model` in place and write `save_dir`/gptq_checkpoint_g<group_size>.pt. Returns the model, which runs.

    Args:
        model: a transformers causal LM in memory; its head stays in float.
        dataloader: yields batches of token ids: tensors [n, L], tuples that begin with one, or dicts with `input_ids`.
        group_size: a power of two, or -1 for one group per output channel.
        wbits: 4, the one width that IPEX's loader reads.
        percdamp: share of the Hessian's mean diagonal that is added to its diagonal.
        act_order: round columns in order of falling activation; the checkpoint then has a g_idx.
        nsamples: rows of the loader to calibrate on.
        use_max_length: take only rows that have `pad_max_length` tokens. Else each as long as it is, up to that. Either
            way a longer row gives a window at a random place, always the same.
        layer_wise: accepted; quantization always goes block by block.
        compression_dtype, compression_dim: torch.int32 and 1, the one layout that IPEX's loader reads.
        scale_dtype: of the stored scales: float16, bfloat16 or float32.
        saved_dir: `save_dir` as IPEX's documentation misspells it.

    Raises ConfigError for what cannot be given, CalibrationError for a loader without ids, CheckpointError where the
    folder holds another model, and the other errors of `woq.errors`.
    """
    _check(group_size, wbits, compression_dtype, compression_dim)
    folder = Path(save_dir if saved_dir is None else saved_dir)
    _refuse_other_models(folder, group_size)
    samples = windows(dataloader, nsamples, pad_max_length, full=use_max_length)
    config = GPTQConfig(
        bits=wbits,
        group_size=group_size,
        sym=sym,
        damp_percent=percdamp,
        desc_act=act_order,
        scale_dtype=scale_dtype,
        num_samples=len(samples),
        seq_len=max(map(len, samples)),
        padding=True,
    )
    model.quantization_report = quantize(model, config, samples)
    _save(model, config, folder)
    return model


def _check(group_size: int, wbits: int, dtype: torch.dtype, dim: int) -> None:
    if wbits != 4:
        raise ConfigError(f"gptq: wbits={wbits}", hint="4: IPEX's loader reads no other width")
    if group_size != -1 and (group_size < 1 or group_size & (group_size - 1)):
        raise ConfigError(
            f"gptq: group_size={group_size}", hint="-1 or a power of two, as IPEX's kernels need"
        )
    if dtype != torch.int32 or dim != 1:
        raise ConfigError(
            f"gptq: compression_dtype={dtype}, compression_dim={dim}",
            hint="torch.int32 and 1: IPEX's loader reads no other layout",
        )


def _refuse_other_models(folder: Path, group_size: int) -> None:
    """Writing a config.json beside another model's weights would spoil it."""
    patterns = ("*.safetensors", "*.bin", "*.pt", "*.pth")
    others = {file.name for pattern in patterns for file in folder.glob(pattern)} - {file_name(group_size)}
    if others:
        raise CheckpointError(f"{folder} holds other weights: {sorted(others)}", hint="an empty save_dir")


def _save(model: Any, config: GPTQConfig, folder: Path) -> None:
    """The checkpoint, whole or not at all, and the config.json that describes it."""
    described = {
        "quant_method": "gptq",
        "bits": config.bits,
        "group_size": config.group_size,
        "sym": config.sym,
        "desc_act": config.desc_act,
        "damp_percent": config.damp_percent,
        "checkpoint_format": "gptq",
    }
    state = _state(model)
    target = folder / file_name(config.group_size)
    partial = target.with_suffix(".partial")
    with explaining(folder):
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, partial)
        partial.replace(target)
    write_json(folder / CONFIG, {**model_dict(model), "quantization_config": described})
    log.info("saved %s", target)


def _state(model: Any) -> dict[str, Tensor]:
    """The model's state dict with quantized layers as IPEX stores them. Raises CheckpointError where one has no form."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    state: dict[str, Tensor] = {
        key: tensor.detach().cpu()
        for key, tensor in model.state_dict().items()
        if key.rpartition(".")[0] not in layers or key.endswith(".bias")
    }
    for name, layer in layers.items():
        weight = layer.packed.unpack()
        reason = why_not(weight)
        if reason is not None:
            raise CheckpointError(f"layer {name!r}: {reason}")
        state |= {f"{name}.{part}": tensor.cpu() for part, tensor in to_tensors(weight).items()}
    return state
