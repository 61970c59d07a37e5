"""Bringing models in: float ones with their blocks left on disk where memory asks for it, quantized ones packed."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from woq.blocks import Linear, find_blocks, linears
from woq.embedding import QuantEmbedding
from woq.errors import CheckpointError
from woq.interop.files import DESCRIPTIONS, IN_CONFIG, UNDESCRIBED
from woq.interop.folder import QuantizedFolder
from woq.linear import QuantLinear
from woq.moe import is_fused_experts, unfuse_experts
from woq.tensor_files import CONFIG, FLOATS, read_json
from woq.weights import WeightSpec

Offload = Literal["auto", "always", "never"]

# A float model that takes more of the free memory than this is read block by block.
_IN_MEMORY_SHARE = 0.4

_TEXTS = ("*.json", "*.model", "*.jinja", "*.txt", "*.py")
_PICKLES = ("*.bin", "*.pt", "*.pth")

# Buffers that older checkpoints store and models now compute (transformers passes over them too).
_RECOMPUTED = re.compile(r".*(rotary_emb\.inv_freq|attn\.(bias|masked_bias))$")


def resolve_folder(path: str | Path, hub: Mapping[str, Any]) -> Path:
    """`path` if it is a local folder, else the hub repository of that name, downloaded into the hub's cache.

    hub: revision, token, cache_dir, local_files_only, as huggingface_hub takes them. Raises CheckpointError.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1:
        raise CheckpointError(
            f"{path} is no folder", hint="pass the folder that holds config.json, or a hub id"
        )
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return _download(str(path), hub)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{path!r} is neither a folder nor a hub repository that can be reached: {error}",
            hint="download it where there is a network and pass the folder",
        ) from error


def _download(name: str, hub: Mapping[str, Any]) -> Path:
    """The repository in the hub's cache. Pickles come only where it is quantized and has no safetensors: those of float
    models are never loaded, and many repositories hold both."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, allow_patterns=[*_TEXTS, "*.safetensors"], **hub))
    if any(folder.glob("*.safetensors")):
        return folder
    config = folder / CONFIG
    described = any((folder / description).exists() for description in DESCRIPTIONS)
    if described or (config.exists() and any(key in read_json(config) for key in IN_CONFIG)):
        return Path(snapshot_download(name, allow_patterns=[*_TEXTS, *_PICKLES], **hub))
    return Path(snapshot_download(name, allow_patterns=[*_TEXTS, *UNDESCRIBED], **hub))


def model_config(folder: Path, trust_remote_code: bool) -> Any:
    """transformers' config of the model in `folder`. Raises CheckpointError where there is none."""
    read_json(folder / CONFIG)  # our message for a missing or malformed file
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    malformed = (ValueError, TypeError, KeyError, AttributeError, OSError, StrictDataclassError)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except malformed as error:
        raise CheckpointError(f"{folder / CONFIG} describes no model transformers knows: {error}") from error


def is_gguf(path: Path) -> bool:
    """Whether `path` is a GGUF file."""
    return path.suffix == ".gguf" and path.is_file()


def load_gguf(file: Path, dtype: torch.dtype | str, trust_remote_code: bool) -> Any:
    """The model in a GGUF file as transformers reads it: dequantized, in float, a plain model from then on.

    Raises CheckpointError where transformers does not know its architecture, the file is damaged, or its rotary
    frequencies are scaled in a way that transformers would pass over.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    from woq.interop.gguf_rope import restore

    read: Any = AutoModelForCausalLM.from_pretrained
    dequantize: Any = GgufConfig(dequantize=True)
    arguments = {"gguf_file": file.name, "dtype": dtype, "trust_remote_code": trust_remote_code}
    try:
        with quiet_bars():
            model = read(file.parent, quantization_config=dequantize, **arguments)
        restore(model, file)
    except (ValueError, KeyError, IndexError, RuntimeError, OSError, ImportError, struct.error) as error:
        raise CheckpointError(
            f"{file} cannot be read by transformers: {error}", hint="is the file whole? is gguf installed?"
        ) from error
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.eval().requires_grad_(False)


def skeleton(config: Any, dtype: torch.dtype | None, trust_remote_code: bool) -> Any:
    """The model without weights: parameters on the meta device, buffers computed as the architecture does."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


# --- float models ------------------------------------------------------------------------------------------------


def load_float(
    folder: Path,
    *,
    dtype: torch.dtype | str,
    device: torch.device,
    offload: Offload,
    blocks: str | None,
    trust_remote_code: bool,
) -> Any:
    """A transformers causal LM ready for `quantize`.

    Where its weights are large for the memory that is free ("auto"), or always, its blocks stay on disk and all else
    goes to `device`; transformers and accelerate read a block's weights when they are needed.
    """
    arguments: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if offload == "always" or (offload == "auto" and not _fits(folder)):
        frame = skeleton(model_config(folder, trust_remote_code), None, trust_remote_code)
        path, found = find_blocks(frame, blocks)
        arguments["device_map"] = _disk_map(frame, path, len(found), device)
        arguments["offload_folder"] = str(_offload_folder())
    return from_transformers(folder, **arguments).eval().requires_grad_(False)


def from_transformers(folder: Path, **arguments: Any) -> Any:
    """transformers' own `from_pretrained`, from safetensors only.

    Raises CheckpointError where files cannot be read, and where a tensor is missing or of another shape:
    transformers would go on with random weights.
    """
    from transformers import AutoModelForCausalLM

    read: Any = AutoModelForCausalLM.from_pretrained
    with (
        _explained(folder),
        quiet_bars(),
    ):  # what does not fit is told here, by name, not in a table on stderr
        model, info = read(
            folder, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    wrong = [f"no tensor for {name}" for name in sorted(info["missing_keys"])]
    wrong += [f"{n} is {list(got)}, expected {list(due)}" for n, got, due in sorted(info["mismatched_keys"])]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(f"{folder} does not fit {type(model).__name__}: {'; '.join(wrong[:5])}{more}")
    return model


def _fits(folder: Path) -> bool:
    import psutil

    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return size < _IN_MEMORY_SHARE * int(psutil.virtual_memory().available)


def _offload_folder() -> Path:
    """Where transformers puts weights it has to convert first (fused experts); removed when the process ends."""
    import atexit
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="woq-offload-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _disk_map(model: nn.Module, path: str, count: int, device: torch.device) -> dict[str, str]:
    """accelerate's device map: every block on disk, everything beside the way to them on `device`."""
    result = {f"{path}.{i}": "disk" for i in range(count)}
    way, module = "", model
    for part in path.split("."):
        prefix = f"{way}." if way else ""
        for name, _ in (*module.named_children(), *module.named_parameters(recurse=False)):
            if name != part:
                result[prefix + name] = str(device)
        way, module = prefix + part, module.get_submodule(part)
    return result


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """transformers' errors about files as ours."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{folder} cannot be loaded: {error}", hint="is the download complete? only safetensors are read"
        ) from error


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Without transformers' own progress bar, which would draw through ours."""
    from transformers.utils import logging

    was = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            logging.enable_progress_bar()


# --- quantized folders -------------------------------------------------------------------------------------------


def load_quantized(folder: Path, *, dtype: torch.dtype | None, backend: str, trust_remote_code: bool) -> Any:
    """The model in a quantized folder, on the CPU, its tensors memory-mapped.

    dtype: of the float parameters; None keeps what is stored. Raises CheckpointError where the folder's tensors and
    the model do not fit each other.
    """
    config = model_config(folder, trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers would look for its own quantizer
    model = skeleton(config, dtype, trust_remote_code)
    source, specs = place_layers(model, folder, backend)
    _place_floats(model, source, dtype)
    model.tie_weights()
    left = [name for name, p in model.named_parameters() if p.is_meta]
    if left:
        raise CheckpointError(
            f"{folder}: no tensor for {left[:5]}{' ...' if len(left) > 5 else ''} of {type(model).__name__}"
        )
    _load_generation_config(model, folder)
    model.config.quantization_config = source.description(specs)
    return model.eval().requires_grad_(False)


def place_layers(model: Any, folder: Path, backend: str) -> tuple[QuantizedFolder, dict[str, WeightSpec]]:
    """Put a `QuantLinear` into `model`, in place, wherever `folder` has packed tensors.

    Returns the folder, and what each layer is. Raises CheckpointError where the folder's tensors and the model do not
    fit each other.
    """
    source = QuantizedFolder(folder)
    source.fit(model)
    unfuse_like(model, source)
    return source, _place_quantized(model, source, backend)


def unfuse_like(model: nn.Module, source: QuantizedFolder) -> None:
    """Take fused experts apart where the folder holds them one by one, quantized or not."""
    for name, module in list(model.named_modules()):
        if is_fused_experts(module) and any(
            key.startswith(f"{name}.0.") for key in (*source.layers, *source.floats)
        ):
            parent = model.get_submodule(name.rpartition(".")[0])
            unfuse_experts(parent)


def _place_quantized(model: Any, source: QuantizedFolder, backend: str) -> dict[str, WeightSpec]:
    """Put a `QuantLinear` wherever the folder has packed tensors; returns what each is."""
    found, specs = linears(model), dict[str, WeightSpec]()
    embeddings = {name: m for name, m in model.named_modules() if m is model.get_input_embeddings()}
    for name in source.layers:
        parent, _, own = name.rpartition(".")
        if isinstance(embeddings.get(name), nn.Embedding):
            rows = source.packed(name, *embeddings[name].weight.shape)
            setattr(model.get_submodule(parent), own, QuantEmbedding(rows, embeddings[name]))
            specs[name] = rows.spec
            continue
        linear = found.get(name)
        if linear is None:
            raise CheckpointError(f"{source.folder}: layer {name!r} is no linear of {type(model).__name__}")
        out_features, in_features = _shape(linear)
        packed = source.packed(name, out_features, in_features)
        bias = source.bias(name, out_features, expected=linear.bias is not None)
        setattr(model.get_submodule(parent), own, QuantLinear(packed, bias, backend))
        specs[name] = packed.spec
    return specs


def _shape(linear: Linear) -> tuple[int, int]:
    rows, columns = linear.weight.shape
    return (rows, columns) if isinstance(linear, nn.Linear) else (columns, rows)


def _place_floats(model: Any, source: QuantizedFolder, dtype: torch.dtype | None) -> None:
    wanted = model.state_dict()
    state = {}
    for name, info in source.floats.items():
        if name not in wanted:
            if _RECOMPUTED.match(name):
                continue
            raise CheckpointError(f"{info.file}: tensor {name!r} is not in {type(model).__name__}")
        if tuple(wanted[name].shape) != info.shape:
            raise CheckpointError(
                f"{info.file}: {name} is {list(info.shape)}, {type(model).__name__} wants {list(wanted[name].shape)}"
            )
        if wanted[name].is_floating_point() and info.dtype not in FLOATS:
            raise CheckpointError(f"{info.file}: {name} is {info.dtype}, expected one of {sorted(FLOATS)}")
        value = source.read(name)
        state[name] = value.to(dtype) if dtype is not None and value.is_floating_point() else value
    model.load_state_dict(state, strict=False, assign=True)


def _load_generation_config(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").exists():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{folder / 'generation_config.json'} is malformed: {error}") from error
