"""`neural_compressor.torch.quantization`: prepare, calibrate, convert, save, load, and tune."""

from woq.compat.neural_compressor.torch.quantization.config import (
    AutoRoundConfig,
    AWQConfig,
    GPTQConfig,
    RTNConfig,
    TEQConfig,
    TorchConfig,
    get_default_AutoRound_config,
    get_default_awq_config,
    get_default_gptq_config,
    get_default_rtn_config,
    get_default_teq_config,
    get_woq_tuning_config,
)
from woq.compat.neural_compressor.torch.quantization.quantize import (
    convert,
    finalize_calibration,
    load,
    prepare,
    quantize,
    save,
)
from woq.compat.neural_compressor.torch.quantization.tuning import TuningConfig, autotune

__all__ = [
    "AWQConfig",
    "AutoRoundConfig",
    "GPTQConfig",
    "RTNConfig",
    "TEQConfig",
    "TorchConfig",
    "TuningConfig",
    "autotune",
    "convert",
    "finalize_calibration",
    "get_default_AutoRound_config",
    "get_default_awq_config",
    "get_default_gptq_config",
    "get_default_rtn_config",
    "get_default_teq_config",
    "get_woq_tuning_config",
    "load",
    "prepare",
    "quantize",
    "save",
]
