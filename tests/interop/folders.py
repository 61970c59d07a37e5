"""Whole folders as other libraries leave them: a tiny Llama whose linears an independent writer packed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.interop.foreign_writers import Plain
from tests.tiny_models import TINY_ARCHITECTURES, VOCABULARY
from woq.blocks import linears

ARCHITECTURE = "llama"


def quantized_by_hand(
    weight: Tensor, *, bits: int = 4, group_size: int = 32, sym: bool = False, least_zero: int = 1
) -> Plain:
    """Round to nearest, a group at a time. Asymmetric zero points are at least `least_zero`."""
    rows, columns = weight.shape
    size, top = (columns if group_size == -1 else group_size), (1 << bits) - 1
    grouped = weight.float().reshape(rows, -1, size)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if sym:
        scales = (grouped.abs().amax(-1) / (top // 2)).clamp(min=1e-5).half()
        zeros = torch.full_like(scales, (top + 1) // 2).long()
    else:
        scales = ((high - low) / (top - least_zero)).clamp(min=1e-5).half()
        zeros = (-low / scales.float()).round().clamp(least_zero, top).long()
    codes = (grouped / scales.float().unsqueeze(-1)).round() + zeros.unsqueeze(-1)
    codes = codes.clamp(0, top).long().reshape(rows, columns)
    return Plain(bits, size, codes, scales, zeros, torch.arange(columns) // size)


Write = Callable[[Plain], dict[str, Tensor]]


def make_folder(
    folder: Path,
    write: Write,
    *,
    config: dict[str, Any] | None = None,
    description: tuple[str, dict[str, Any]] | None = None,
    file: str = "model.safetensors",
    **how: Any,
) -> nn.Module:
    """A folder with quantized blocks; returns the float model that its weights mean.

    config: the quantization_config of config.json, if any. description: name and content of a file beside it.
    file: what the tensors are in, safetensors or a pickle.
    """
    model = TINY_ARCHITECTURES[ARCHITECTURE]()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, linear in linears(model.get_submodule("model.layers")).items():
        full = f"model.layers.{name}"
        plain = quantized_by_hand(linear.weight.detach(), **how)
        linear.weight.data = plain.dequantize()
        del tensors[f"{full}.weight"]
        tensors |= {f"{full}.{part}": tensor for part, tensor in write(plain).items()}
    save(model, folder, tensors, config, description, file)
    return model


def save(
    model: nn.Module,
    folder: Path,
    tensors: dict[str, Tensor],
    config: dict[str, Any] | None,
    description: tuple[str, dict[str, Any]] | None,
    file: str,
) -> None:
    """The files of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {"architectures": [type(model).__name__], **model.config.to_diff_dict()}  # type: ignore[operator, union-attr]
    if config is not None:
        own["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(own, default=str))
    if description is not None:
        (folder / description[0]).write_text(json.dumps(description[1]))
    if file.endswith(".safetensors"):
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / file)
    else:
        torch.save(tensors, folder / file)


def token_ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(token_ids()).logits
    return result
