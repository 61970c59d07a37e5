"""AutoGPTQ's model classes and its config: load a float model, quantize it on examples, save it, load it again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import nn

from woq.configs import ConfigWarning, GPTQConfig
from woq.errors import CalibrationError, CheckpointError, ConfigError
from woq.linear import QuantLinear
from woq.modeling import AutoModelForCausalLM
from woq.quantization import quantize
from woq.saving import save_pretrained
from woq.tensor_files import CONFIG, QUANTIZE_CONFIG, read_json

# What AutoGPTQ's methods take and what has no counterpart here: the values that pass silently, and why others do nothing.
_NO_COUNTERPART: dict[str, tuple[tuple[Any, ...], str]] = {
    "max_memory": ((None,), "a quantized model runs on one device, a float one is read block by block"),
    "low_cpu_mem_usage": ((False, True), ""),
    "use_cuda_fp16": ((True,), "kernels take the activations' own dtype and accumulate in float32"),
    "autotune_warmup_after_quantized": ((False,), "nothing is tuned before it runs"),
    "cache_examples_on_gpu": ((True,), "activations stay where there is room for them"),
    "use_qigen": ((False,), "the backend is picked by what runs the layer"),
    "use_marlin": ((False,), "the backend is picked by what runs the layer"),
    "inject_fused_attention": ((None, False), "modules are never fused"),
    "inject_fused_mlp": ((None, False), "modules are never fused"),
    "warmup_triton": ((False,), "nothing is tuned before it runs"),
    "trainable": ((False, True), ""),
    "disable_exllama": ((None, False, True), ""),
    "disable_exllamav2": ((False, True), ""),
    "strict": ((True,), "a folder that does not fit the model is always refused"),
    "checkpoint_format": ((None, "gptq", "gptq_v2"), "the folder says what it is"),
    "resume_download": ((None, False, True), ""),
}


def _without(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` less those without a counterpart; ConfigWarning names those of them that ask for something."""
    kept = {}
    for name, value in options.items():
        silent, reason = _NO_COUNTERPART.get(name, ((), ""))
        if name not in _NO_COUNTERPART:
            kept[name] = value
        elif value not in silent:
            warnings.warn(f"{method}: {name}={value!r} does nothing: {reason}", ConfigWarning, stacklevel=3)
    return kept


@dataclass
class BaseQuantizeConfig:
    """AutoGPTQ's settings with its defaults, which are not ours: one scale a channel, and act-order."""

    bits: int = 4
    group_size: int = -1
    damp_percent: float = 0.01
    desc_act: bool = True
    static_groups: bool = False
    sym: bool = True
    true_sequential: bool = True
    quant_method: Literal["gptq"] = "gptq"
    checkpoint_format: str = "gptq"
    model_name_or_path: str | None = None
    model_file_base_name: str | None = None

    def __post_init__(self) -> None:
        self.to_woq()

    def to_woq(self, **more: Any) -> GPTQConfig:
        """The same settings as woq's, with `more` fields of it. Raises ConfigError."""
        if self.checkpoint_format not in ("gptq", "gptq_v2"):
            raise ConfigError(
                f"BaseQuantizeConfig.checkpoint_format = {self.checkpoint_format!r}",
                hint="'gptq': kernels' own layouts exist in memory only",
            )
        names = ("bits", "group_size", "damp_percent", "desc_act", "static_groups", "sym", "true_sequential")
        return GPTQConfig(**{name: getattr(self, name) for name in (*names, "quant_method")}, **more)

    def to_dict(self) -> dict[str, Any]:
        """Every field."""
        return asdict(self)

    def save_pretrained(self, save_dir: str | Path, **_: Any) -> None:
        """Write quantize_config.json."""
        text = json.dumps(self.to_dict(), indent=2)
        (Path(save_dir) / QUANTIZE_CONFIG).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, save_dir: str | Path, **_: Any) -> Self:
        """From a folder's quantize_config.json, or its config.json. Raises CheckpointError."""
        alone = Path(save_dir) / QUANTIZE_CONFIG
        found = (
            read_json(alone)
            if alone.exists()
            else read_json(Path(save_dir) / CONFIG).get("quantization_config")
        )
        if not isinstance(found, dict):
            raise CheckpointError(f"{save_dir} has no {QUANTIZE_CONFIG} and no quantization_config")
        return cls(**{name: found[name] for name in cls.__dataclass_fields__ if name in found})


class BaseGPTQForCausalLM(nn.Module):
    """A model to be quantized, or a quantized one. Subclasses may say where the blocks are and what to quantize.

    layers_block_name: dotted name of the list of blocks (`blocks` in our configs); None: found by structure.
    inside_layer_modules: names of linears in a block, in groups that are quantized one after the other
    (`modules_in_block_to_quantize`); None: all. outside_layer_modules: accepted and not needed, whatever is outside the
    blocks is found.
    """

    layers_block_name: str | None = None
    outside_layer_modules: Sequence[str] | None = None
    inside_layer_modules: Sequence[Sequence[str]] | None = None

    def __init__(self, model: Any, quantized: bool, quantize_config: BaseQuantizeConfig) -> None:
        super().__init__()
        self.model, self.quantize_config = model, quantize_config
        self._quantized = quantized

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        quantize_config: BaseQuantizeConfig,
        *,
        torch_dtype: torch.dtype | str = "auto",
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Self:
        """The float model, in host memory. Raises the errors of `woq.errors`."""
        kept = _without("from_pretrained", options)
        model = AutoModelForCausalLM.from_pretrained(
            pretrained_model_name_or_path,
            dtype=torch_dtype,
            device_map="cpu",
            trust_remote_code=trust_remote_code,
            **kept,
        )
        return cls(model.eval(), False, quantize_config)

    @property
    def quantized(self) -> bool:
        """Whether the model holds quantized layers."""
        return self._quantized

    def quantize(
        self,
        examples: Sequence[Mapping[str, Any]],
        batch_size: int = 1,
        *,
        use_triton: bool = False,
        **options: Any,
    ) -> None:
        """Quantize in place, on examples with `input_ids` and `attention_mask`; each is a sample of its own.

        Raises CalibrationError where there are none, and the other errors of `woq.errors`.
        """
        unknown = _without("quantize", options)
        if unknown:
            raise ConfigError(f"quantize takes no {sorted(unknown)}")
        if self._quantized:
            raise ConfigError("the model is quantized already")
        if not examples:
            raise CalibrationError("no examples", hint="a list of what a tokenizer returns")
        lengths = [torch.as_tensor(example["input_ids"]).numel() for example in examples]
        config = self.quantize_config.to_woq(
            blocks=self.layers_block_name,
            modules_in_block_to_quantize=self.inside_layer_modules,
            num_samples=len(examples),
            seq_len=max(lengths),
            batch_size=batch_size,
            padding=True,
        )
        self.model.quantization_report = quantize(self.model, config, list(examples))
        for module in self.model.modules():
            if isinstance(module, QuantLinear):
                module.requested_backend = "triton" if use_triton else "auto"
        self._quantized = True

    def save_quantized(
        self,
        save_dir: str | Path,
        use_safetensors: bool = True,
        safetensors_metadata: Mapping[str, str] | None = None,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Write the folder, as safetensors whatever is asked for: nothing is pickled."""
        if not use_safetensors:
            warnings.warn(
                "save_quantized: use_safetensors=False does nothing: nothing is pickled",
                ConfigWarning,
                stacklevel=2,
            )
        if safetensors_metadata is not None:
            raise ConfigError(
                "save_quantized takes no safetensors_metadata", hint="keep notes beside the folder"
            )
        save_pretrained(self.model, save_dir, max_shard_size=max_shard_size)

    save_pretrained = save_quantized

    @classmethod
    def from_quantized(  # noqa: PLR0913 - AutoGPTQ's signature
        cls,
        model_name_or_path: str | Path,
        *,
        device: str | int | torch.device | None = None,
        device_map: Any = None,
        use_triton: bool = False,
        use_tritonv2: bool = False,
        torch_dtype: torch.dtype | str | None = None,
        use_safetensors: bool = True,  # noqa: ARG003 - whatever is there is read, pickles never
        model_basename: str | None = None,
        quantize_config: BaseQuantizeConfig | None = None,
        **options: Any,
    ) -> Self:
        """A quantized folder, on one device. Raises the errors of `woq.errors`."""
        kept = _without("from_quantized", options)
        if device_map is not None and device is not None:
            raise ConfigError(f"device={device!r} and device_map={device_map!r}", hint="give one of the two")
        place = device if device_map is None else device_map
        if isinstance(place, int):
            place = f"cuda:{place}"
        folder = Path(model_name_or_path)
        if model_basename is not None and folder.is_dir() and not any(folder.glob(f"{model_basename}*")):
            raise CheckpointError(f"{folder} has no file {model_basename}.safetensors")
        model = AutoModelForCausalLM.from_pretrained(
            model_name_or_path,
            device_map=place,
            dtype="auto" if torch_dtype is None else torch_dtype,
            backend="triton" if use_triton or use_tritonv2 else "auto",
            **kept,
        )
        found = model.config.quantization_config
        own = {name: found[name] for name in BaseQuantizeConfig.__dataclass_fields__ if name in found}
        return cls(
            model,
            True,
            quantize_config
            or BaseQuantizeConfig(**own | {"quant_method": "gptq", "checkpoint_format": "gptq"}),
        )

    def push_to_hub(
        self,
        repo_id: str,
        save_dir: str | Path | None = None,
        *,
        use_safetensors: bool = True,
        use_auth_token: bool | str | None = None,
        token: bool | str | None = None,
        **options: Any,
    ) -> Any:
        """Upload the quantized model; with `save_dir` it is saved there too. Other arguments as transformers has them."""
        if save_dir is not None:
            self.save_quantized(save_dir, use_safetensors)
        return self.model.push_to_hub(repo_id, token=use_auth_token if token is None else token, **options)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward."""
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own generate."""
        return self.model.generate(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


class AutoGPTQForCausalLM(BaseGPTQForCausalLM):
    """Any causal LM: blocks and linears are found by structure."""
