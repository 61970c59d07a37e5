"""prepare, then run the model on calibration data, then convert; and save, load.

A prepared model is the float model with a hook that keeps the token ids it is called with; `convert` quantizes it on
them. So the loop that calibrates is the user's own, as in neural-compressor, and the model's outputs in it are right.
"""

from __future__ import annotations

import copy
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import woq
from woq.compat.neural_compressor.torch.quantization.config import TorchConfig, as_torch_config
from woq.compat.samples import token_rows
from woq.configs import CalibratedConfig
from woq.errors import CalibrationError, ConfigError
from woq.saving import model_dict, save_pretrained
from woq.tensor_files import CONFIG
from woq.writer import write_json

FORMATS = ("default", "huggingface")


class Recorder:
    """What a prepared model was called with. Kept as its attribute `woq_calibration` until it is converted."""

    def __init__(self, config: TorchConfig) -> None:
        self.config = config
        self.rows: list[Tensor] = []
        self.handle: Any = None

    def __call__(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward hook: keep the ids."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise CalibrationError("the prepared model was called without input_ids")
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        batch = {"input_ids": ids.cpu()} | ({} if mask is None else {"attention_mask": mask.cpu()})
        self.rows += token_rows(batch)


def prepare(model: Any, quant_config: Any, inplace: bool = True, example_inputs: Any = None) -> Any:  # noqa: ARG001
    """The float model, which from now on keeps the token ids that it is called with. `example_inputs` is not needed.

    Raises ConfigError for a config that is none, or that does not fit.
    """
    prepared = model if inplace else copy.deepcopy(model)
    if getattr(prepared, "woq_calibration", None) is not None:
        raise ConfigError("the model is prepared already", hint="convert it")
    recorder = Recorder(as_torch_config(quant_config))
    recorder.handle = prepared.register_forward_pre_hook(recorder, with_kwargs=True)
    prepared.woq_calibration = recorder
    return prepared


def convert(model: Any, quant_config: Any = None, inplace: bool = True) -> Any:
    """The quantized model, with a method `save(folder, format=...)`.

    quant_config: for a model that was not prepared; `RTNConfig` alone needs no calibration. Raises CalibrationError where
    a prepared model was not run, and the other errors of `woq.errors`.
    """
    recorder: Recorder | None = getattr(model, "woq_calibration", None)
    if recorder is None and quant_config is None:
        raise ConfigError(
            "the model is not prepared, and there is no quant_config", hint="prepare(model, config)"
        )
    if recorder is not None:
        recorder.handle.remove()
        del model.woq_calibration
    asked = as_torch_config(quant_config) if recorder is None else recorder.config
    rows = [] if recorder is None else recorder.rows
    converted = model if inplace else copy.deepcopy(model)
    more: dict[str, Any] = {}
    if issubclass(asked.ours, CalibratedConfig):
        if not rows:
            raise CalibrationError(
                f"{type(asked).__name__} was given nothing to calibrate on",
                hint="run the prepared model on token ids between prepare and convert",
            )
        more = {"num_samples": len(rows), "seq_len": max(map(len, rows)), "padding": True}
    converted.quantization_report = woq.quantize(converted, asked.to_woq(**more), rows or None)
    converted.is_quantized = True
    return _with_save(converted)


def quantize(
    model: Any,
    quant_config: Any,
    run_fn: Callable[..., Any] | None = None,
    run_args: Any = None,
    inplace: bool = True,
    example_inputs: Any = None,
) -> Any:
    """prepare, `run_fn(model, *run_args)`, convert. Raises what they raise."""
    prepared = prepare(model, quant_config, inplace, example_inputs)
    if run_fn is not None:
        arguments = run_args if isinstance(run_args, tuple) else () if run_args is None else (run_args,)
        with torch.no_grad():
            run_fn(prepared, *arguments)
    return convert(prepared)


def finalize_calibration(model: Any) -> None:
    """Nothing is left to do: what calibration saw stays with the model until `convert`."""


def _with_save(model: Any) -> Any:
    model.save = types.MethodType(save, model)
    model.save_pretrained = types.MethodType(save_pretrained, model)
    return model


def save(model: Any, checkpoint_dir: str | Path = "saved_results", format: str = "default") -> None:
    """Write the quantized model as our folder, in safetensors, whichever format is asked for: nothing is pickled.

    Raises ConfigError for another format than "default" and "huggingface", CheckpointError where it cannot be written.
    """
    _known(format)
    save_pretrained(model, checkpoint_dir)


def load(
    model_name_or_path: str | Path,
    original_model: Any = None,
    format: str = "default",
    device: str = "cpu",
    **kwargs: Any,
) -> Any:
    """The model in a quantized folder, ours or neural-compressor's (`quantized_weight.pt` and `qconfig.json`).

    original_model: gives the model's config where the folder has none, as those of neural-compressor; its weights are
    not looked at. kwargs: as `woq.AutoModelForCausalLM.from_pretrained` takes them. Raises the errors of `woq.errors`.
    """
    _known(format)
    kwargs.pop("sharded_checkpoints", None)  # told from the files
    folder = Path(model_name_or_path)
    if original_model is None or not folder.is_dir() or (folder / CONFIG).exists():
        return _with_save(
            woq.AutoModelForCausalLM.from_pretrained(model_name_or_path, device_map=device, **kwargs)
        )
    with (
        tempfile.TemporaryDirectory() as beside
    ):  # read-only for us: the config is put beside links to the files
        for file in folder.iterdir():
            (Path(beside) / file.name).symlink_to(file.resolve())
        write_json(Path(beside) / CONFIG, model_dict(original_model))
        return _with_save(woq.AutoModelForCausalLM.from_pretrained(beside, device_map=device, **kwargs))


def _known(format: str) -> None:
    if format not in FORMATS:
        raise ConfigError(f"format={format!r}", hint=f"one of {FORMATS}")
