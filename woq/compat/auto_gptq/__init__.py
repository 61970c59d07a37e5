"""AutoGPTQ's names on woq: write `woq.compat.auto_gptq` where a script imports `auto_gptq`.

The classes are thin doors: the same arguments, our loading, quantization, files and kernels. An argument that means
nothing here is warned of by name (`woq.configs.ConfigWarning`) when it is set to other than its default.
"""

from woq.compat.auto_gptq.modeling import AutoGPTQForCausalLM, BaseGPTQForCausalLM, BaseQuantizeConfig

__all__ = ["AutoGPTQForCausalLM", "BaseGPTQForCausalLM", "BaseQuantizeConfig"]
