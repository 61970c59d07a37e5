"""The door: the `from_pretrained` that users know, quantizing on the way or loading what was quantized."""

from __future__ import annotations

import logging
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from woq.backends import refusals
from woq.backends.base import COMPUTE_DTYPES, ComputeDtype, Target
from woq.configs import QuantConfig, as_config, config_from_dict
from woq.device import available_devices, quantization_device
from woq.errors import CheckpointError, ConfigError
from woq.interop import find
from woq.linear import QuantLinear
from woq.loading import (
    Offload,
    from_transformers,
    is_gguf,
    load_float,
    load_gguf,
    load_quantized,
    model_config,
    resolve_folder,
)
from woq.progress import ConsoleProgress, Progress
from woq.report import Report
from woq.saving import finish_folder, save_pretrained
from woq.selfcheck import prepare_and_check

log = logging.getLogger(__name__)

_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only")


class AutoModelForCausalLM:
    """As transformers' class of this name: `AutoModelForCausalLM.from_pretrained(...)`."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        quantization_config: Any = None,
        calibration: Any = None,
        tokenizer: Any = None,
        device_map: str | torch.device | None = None,
        dtype: torch.dtype | str = "auto",
        backend: str = "auto",
        compute_dtype: str | None = "auto",
        offload: Offload = "auto",
        trust_remote_code: bool = False,
        progress: Progress | None = None,
        **hub: Any,
    ) -> Any:
        """Load a model: quantized already, to be quantized now, or plain.

        Args:
            path: a folder, float or quantized by any library that docs/interop.md lists; a hub id; or a GGUF file,
                which is dequantized.
            quantization_config: quantize with this: a config of ours, a dict, or transformers' GPTQConfig, AwqConfig,
                AutoRoundConfig or BitsAndBytesConfig. Refused for a folder that is quantized already.
            calibration, tokenizer: as in `woq.quantization.quantize`; the tokenizer in `path` is found by itself.
            device_map: the one device the model runs on ("cpu", "cuda", "cuda:1", "xpu"); None or "auto": the best.
            dtype: of activations and of what stays float. "auto": what is stored, but bfloat16 in place of float16
                on a CPU, where float16 is many times slower.
            backend: "auto" or a name that `woq doctor` lists.
            compute_dtype: the least that activations may be rounded to in quantized linears, by IPEX's names too: None or
                "none" (not at all), "fp32", "fp16", "bf16", "int8" (faster on CPUs; docs/cpu.md has the error). "auto":
                as the configuration says that quantized the model.
            offload: whether a float model's blocks are read from disk one by one: "auto" when memory is short.
            hub: revision, token, cache_dir, local_files_only.

        Returns the transformers model, on its device, with `quantization_config` (what made it, as a dict in its
        `config`) and, where quantization ran, `quantization_report`; every kernel has been checked against the
        reference. Raises the errors of `woq.errors`.
        """
        _refuse_unknown(hub)
        as_compute_dtype(compute_dtype)
        device = run_device(device_map)
        if is_gguf(Path(path)):
            return _from_gguf(Path(path), quantization_config, dtype, device, trust_remote_code)
        folder = resolve_folder(path, hub)
        quantized_already = find(folder) is not None
        if quantized_already and quantization_config is not None:
            raise ConfigError(
                f"{folder} is quantized already", hint="leave quantization_config out to load it"
            )
        stored = model_config(folder, trust_remote_code).dtype
        running = run_dtype(dtype, stored, device)
        if quantized_already:
            model = load_quantized(
                folder, dtype=running, backend=backend, trust_remote_code=trust_remote_code
            )
        elif quantization_config is None:
            plain = from_transformers(folder, dtype=running, trust_remote_code=trust_remote_code)
            return plain.to(device)
        else:
            model = _quantize_now(
                folder,
                quantization_config,
                offload=offload,
                backend=backend,
                calibration=calibration,
                tokenizer=tokenizer,
                dtype=dtype,
                stored=stored,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
        return _ready(model, device, running, compute_dtype)


def quantize_folder(
    source: str | Path,
    target: str | Path,
    config: QuantConfig,
    calibration: Any = None,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | str = "auto",
    offload: Offload = "auto",
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **hub: Any,
) -> Report:
    """Quantize the model in `source` into the folder `target`, block by block.

    resume: go on with an unfinished run of the same model, configuration and data; the result is the same to the
    byte. overwrite: replace `target` when all is done. dtype: what quantization computes in. Other arguments as in
    `AutoModelForCausalLM.from_pretrained`. Raises the errors of `woq.errors`.
    """
    from woq.quantization import quantize
    from woq.writer import FolderWriter

    folder, destination = resolve_folder(source, hub), Path(target)
    if find(folder) is not None:
        raise CheckpointError(f"{folder} is quantized already", hint="start from the float checkpoint")
    writer = FolderWriter(destination, resume=resume, overwrite=overwrite)
    device = quantization_device(config.device)
    stored = model_config(folder, trust_remote_code)
    model = load_float(
        folder,
        dtype=_compute_dtype(dtype, stored.dtype, device),
        device=device,
        offload=offload,
        blocks=config.blocks,
        trust_remote_code=trust_remote_code,
    )
    model.config.dtype = stored.dtype
    with progress or ConsoleProgress() as bars:
        report = quantize(
            model,
            config,
            calibration,
            tokenizer=tokenizer or tokenizer_of(folder),
            progress=bars,
            writer=writer,
        )
    finish_folder(model, report, writer, folder)
    return report


def _quantize_now(folder: Path, given: Any, *, offload: Offload, **options: Any) -> Any:
    """Load a float model and quantize it in memory."""
    from woq.quantization import quantize

    config = as_config(given)
    device = quantization_device(config.device)
    trust, dtype = options["trust_remote_code"], _compute_dtype(options["dtype"], options["stored"], device)
    model = load_float(
        folder, dtype=dtype, device=device, offload=offload, blocks=config.blocks, trust_remote_code=trust
    )
    tokenizer = options["tokenizer"] or tokenizer_of(folder)
    with options["progress"] or ConsoleProgress() as bars:
        report = quantize(model, config, options["calibration"], tokenizer=tokenizer, progress=bars)
    model.quantization_report = report
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.requested_backend = options["backend"]
    return model


def _from_gguf(file: Path, quantization: Any, dtype: Any, device: torch.device, trust: bool) -> Any:
    """A GGUF file's model in float."""
    if quantization is not None:
        raise ConfigError(
            f"{file} is quantized already", hint="leave quantization_config out: it is loaded in float"
        )
    return load_gguf(file, run_dtype(dtype, torch.float32, device), trust).to(device)


def _refuse_unknown(hub: Mapping[str, Any]) -> None:
    """What is no argument of ours may only be one that finds a hub repository: a misspelt one must not be lost."""
    unknown = sorted(hub.keys() - set(_HUB_ARGUMENTS))
    if unknown:
        raise ConfigError(
            f"from_pretrained takes no {unknown}", hint=f"besides its own: {list(_HUB_ARGUMENTS)}"
        )


def _ready(model: Any, device: torch.device, dtype: torch.dtype, compute_dtype: str | None) -> Any:
    """On its device, in its dtype, every kernel checked, saving as a quantized model does."""
    for parameter in model.parameters():  # parameters only: rotary frequencies and the like stay float32
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.to(device)
    device = next(model.parameters()).device  # "cuda" became "cuda:0", as inputs will say
    model.config.dtype = dtype
    own = model.config.quantization_config.get("woq", {}).get("config")
    model.quantization_config = None if own is None else config_from_dict(own)
    _set_compute_dtype(model, compute_dtype)
    counts = prepare_and_check(model, Target(device, dtype))
    used = ", ".join(f"{name} for {count} layers" for name, count in counts.items())
    log.info("running on %s in %s: %s", device, dtype, used)
    if "reference" in counts:
        _say_why_slow(model, Target(device, dtype))
    model.save_pretrained = types.MethodType(save_pretrained, model)
    return model


def _set_compute_dtype(model: Any, requested: str | None) -> None:
    """Tell every quantized linear what activations may be rounded to, as asked or as the model's configuration says."""
    recorded = None if model.quantization_config is None else model.quantization_config.compute_dtype
    chosen = recorded if requested == "auto" else as_compute_dtype(requested)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.compute_dtype = chosen
    if chosen == "int8":
        log.info("activations of quantized linears may be rounded to int8 (compute_dtype)")


def as_compute_dtype(requested: str | None) -> ComputeDtype | None:
    """One of `COMPUTE_DTYPES`, in any case; None for None, "none" and "auto". Raises ConfigError."""
    name = "none" if requested is None else str(requested).lower()
    if name in ("none", "auto"):
        return None
    for known in COMPUTE_DTYPES:
        if name == known:
            return known
    raise ConfigError(
        f"compute_dtype={requested!r}", hint=f"one of {[*COMPUTE_DTYPES, 'none', 'auto']}, in any case"
    )


def _say_why_slow(model: nn.Module, target: Target) -> None:
    """The reference dequantizes on every call: name the layers it took and what the faster backends objected to."""
    reasons: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, QuantLinear) and module.backend == "reference":
            told = "; ".join(f"{name}: {reason}" for name, reason in refusals(module.spec, target).items())
            reasons[told] = reasons.get(told, 0) + 1
    for told, count in reasons.items():
        log.warning("%d layers run on the slow reference backend (%s)", count, told or "it was asked for")


def run_device(device_map: Any) -> torch.device:
    """Raises ConfigError for maps over several devices and for devices that are not there."""
    if device_map is None or device_map == "auto":
        return torch.device(available_devices()[0])
    if not isinstance(device_map, str | torch.device):
        raise ConfigError(
            f"device_map={device_map!r}: a quantized model runs on one device",
            hint=f"one of {available_devices()}, 'cuda:<index>' or 'auto'",
        )
    return quantization_device(str(device_map))


def run_dtype(requested: torch.dtype | str, stored: torch.dtype | None, device: torch.device) -> torch.dtype:
    """What the model runs in: as asked, else as stored, but never float16 on a CPU."""
    chosen = as_dtype(requested) or stored or torch.float32
    if requested == "auto" and device.type == "cpu" and chosen == torch.float16:
        return torch.bfloat16
    return chosen


def _compute_dtype(
    requested: torch.dtype | str, stored: torch.dtype | None, device: torch.device
) -> torch.dtype:
    """What quantization computes in: as asked, else as stored, but float32 for float16 on a CPU."""
    chosen = as_dtype(requested) or stored or torch.float32
    if requested == "auto" and device.type == "cpu" and chosen == torch.float16:
        return torch.float32
    return chosen


def as_dtype(requested: torch.dtype | str) -> torch.dtype | None:
    """A float dtype by itself or by name; None for "auto". Raises ConfigError."""
    if requested == "auto":
        return None
    value = (
        getattr(torch, requested.removeprefix("torch."), None) if isinstance(requested, str) else requested
    )
    if value not in (torch.float32, torch.float16, torch.bfloat16):
        raise ConfigError(f"dtype={requested!r}", hint="'auto', 'float32', 'float16' or 'bfloat16'")
    return value


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer in `folder`, or None where there is none: token ids need none."""
    if not any(folder.glob("tokenizer*")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be loaded: {error}", hint="mend it, or pass tokenizer=..."
        ) from error
