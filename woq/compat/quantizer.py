"""transformers' own `from_pretrained` on our folders: a registered quantizer, and its config.

transformers builds the model without weights, asks the quantizer to put its layers in, loads all other tensors, and
hands the model back. The packed tensors are read by `woq.loading`, checked as at our own door, and stay memory-mapped;
while transformers loads, a slot that holds nothing but the bias keeps each layer's place.

Which folders come here (transformers decides by class, so one seam of it is widened, `merge_quantization_configs`):
those that woq wrote, under whatever quant_method, unless another config is passed; any, where a `WoqConfig` is passed;
and GPTQ and AWQ folders of others where the packages that transformers needs for them are not installed.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import AutoHfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.import_utils import is_gptqmodel_available, is_optimum_available
from transformers.utils.quantization_config import QuantizationConfigMixin

from woq.errors import ConfigError

log = logging.getLogger(__name__)

METHOD = "woq"
_NEEDS_GPTQMODEL = ("gptq", "awq")  # in transformers


class WoqConfig(QuantizationConfigMixin):
    """What transformers' `quantization_config=` takes to quantize a float model with woq, or to run a folder with it.

    config: one of woq's configs, to quantize a float model with; calibration and tokenizer as `woq.quantize` takes
    them. For a folder that is quantized already leave it out; `backend` is "auto" or a name that `woq doctor` lists.
    """

    def __init__(
        self,
        config: Any = None,
        *,
        calibration: Any = None,
        tokenizer: Any = None,
        backend: str = "auto",
    ) -> None:
        self.quant_method: Any = METHOD  # transformers compares it as a string
        self.config, self.calibration, self.tokenizer, self.backend = config, calibration, tokenizer, backend
        self.folder: dict[str, Any] | None = None  # the quantization_config of a quantized model

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config of a folder with this `quantization_config`."""
        made = cls()
        made.folder = dict(config_dict)
        return (made, kwargs) if return_unused_kwargs else made

    def for_folder(self, found: dict[str, Any]) -> Self:
        """This config's choices, for the folder with the `quantization_config` found."""
        if self.config is not None:
            raise ConfigError(
                "the folder is quantized already", hint="leave WoqConfig's config out to load it"
            )
        made: Self = type(self).from_dict(found)
        made.backend = self.backend
        return made

    def to_dict(self) -> dict[str, Any]:
        """What stands in a folder's config.json."""
        if self.folder is not None:
            return dict(self.folder)
        return {"quant_method": METHOD} | ({} if self.config is None else {"config": self.config.to_dict()})


class WoqQuantizer(HfQuantizer):
    """Loads packed layers into a transformers model, or quantizes one that was loaded in float."""

    quantization_config: WoqConfig
    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._slots: dict[str, _Slot] = {}
        self._on_cpu = True
        if not self.pre_quantized and quantization_config.config is None:
            raise ConfigError(
                "WoqConfig() quantizes nothing, and this model is in float",
                hint="WoqConfig(GPTQConfig(bits=4)), or a folder that is quantized",
            )

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Raises ConfigError for maps over several devices."""
        places = set(map(str, device_map.values())) if isinstance(device_map, dict) else {str(device_map)}
        if len(places) > 1:
            raise ConfigError(
                f"device_map over {sorted(places)}: a quantized model runs on one device",
                hint="device_map='cuda:0', 'xpu' or 'cpu'",
            )
        self._on_cpu = places <= {"None", "cpu"} or not (
            torch.cuda.is_available() or torch.xpu.is_available()
        )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float16 on a CPU is many times slower than bfloat16: nobody who asks for it means that."""
        if self._on_cpu and dtype == torch.float16:
            log.warning("running in bfloat16: float16 is many times slower on a CPU")
            return torch.bfloat16
        return dtype

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        from woq.interop.names import Naming
        from woq.linear import QuantLinear
        from woq.loading import place_layers
        from woq.moe import UnfusedExperts

        folder = Path(kwargs["checkpoint_files"][0]).parent
        with torch.device("cpu"):  # transformers builds the model under the meta device
            source, specs = place_layers(model, folder, self.quantization_config.backend)
        self.quantization_config.folder = source.description(specs)
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantLinear):
                self._slots[name] = _Slot(module)
                model.set_submodule(name, self._slots[name])
            elif isinstance(module, UnfusedExperts):
                module.shell._is_hf_initialized = True  # its parameters are gone: nothing to draw at random
        # transformers looks for what is left over among the names that it changed
        used = source.used | set(map(Naming(model).renamed, source.used))
        ours = "|".join(re.escape(name) for name in sorted(used - model.state_dict().keys()))
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {f"^({ours})$"}

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        from woq.backends.base import Target
        from woq.selfcheck import prepare_and_check

        if self.pre_quantized:
            for name, slot in self._slots.items():
                model.set_submodule(name, slot.filled())
            self._slots = {}
        else:
            self._quantize(model)
        model.requires_grad_(False)
        counts = prepare_and_check(model, Target(model.device, model.dtype))
        log.info("running on %s in %s: %s", model.device, model.dtype, counts)
        return model

    def _quantize(self, model: Any) -> None:
        from woq.configs import as_config
        from woq.modeling import tokenizer_of
        from woq.quantization import quantize

        asked = self.quantization_config
        source = Path(model.config.name_or_path)
        tokenizer = asked.tokenizer or (tokenizer_of(source) if source.is_dir() else None)
        model.quantization_report = quantize(
            model, as_config(asked.config), asked.calibration, tokenizer=tokenizer
        )
        asked.folder = model.config.quantization_config
        model.config.quantization_config = asked

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        from woq.linear import QuantLinear

        for name, layer in list(model.named_modules()):
            if isinstance(layer, QuantLinear):
                plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
                plain.weight = nn.Parameter(layer.dequantize(dtype or torch.float32).to(model.device))
                plain.register_parameter("bias", layer.bias)
                model.set_submodule(name, plain)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Packed tensors are copied: they may be memory-mapped from the very file that is about to be written."""
        parameters = dict(model.named_parameters())
        state = {n: t if n in parameters else t.clone() for n, t in model.state_dict().items()}
        return state, {}

    def is_serializable(self) -> bool:
        """A model saves what it loaded, to the bit."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train on top; the gradient with respect to a layer's input is the reference's."""
        return True


class _Slot(nn.Module):
    """A quantized layer's place while transformers loads: all it shows is the bias, if there is one."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self._held = (layer,)  # in a tuple, so that it is no submodule
        self.register_parameter("bias", layer.bias)
        # Some models' initialization reaches into the linears of a block; this says that there is nothing to do.
        self.weight = torch.empty(0)
        self.weight.__dict__["_is_hf_initialized"] = True

    def filled(self) -> nn.Module:
        """The layer, with the bias that was loaded."""
        (layer,) = self._held
        layer.bias = self.bias
        result: nn.Module = layer
        return result


def _comes_here(found: dict[str, Any]) -> bool:
    """Whether a folder with this `quantization_config` is ours to run where nobody said who should."""
    if found.get("quant_method") == METHOD or METHOD in found:
        return True
    others_can = is_optimum_available() and is_gptqmodel_available()
    return found.get("quant_method") in _NEEDS_GPTQMODEL and not others_can


_theirs = AutoHfQuantizer.merge_quantization_configs


def _merge(quantization_config: Any, quantization_config_from_args: Any) -> Any:
    """transformers' choice of the config of a quantized folder, ours where it is ours to make."""
    found, given = quantization_config, quantization_config_from_args
    if isinstance(found, dict) and isinstance(given, WoqConfig):
        return given.for_folder(found)
    if isinstance(found, dict) and given is None and _comes_here(found):
        return WoqConfig.from_dict(found)
    return _theirs(found, given)


register_quantization_config(METHOD)(WoqConfig)
register_quantizer(METHOD)(WoqQuantizer)
AutoHfQuantizer.merge_quantization_configs = staticmethod(_merge)  # type: ignore[method-assign]
