"""IPEX's GPTQ on woq: write `import woq.compat.ipex as ipex` where a script imports `intel_extension_for_pytorch`."""

from woq.compat.ipex import quantization
from woq.compat.ipex.quantization import gptq

__all__ = ["gptq", "quantization"]
