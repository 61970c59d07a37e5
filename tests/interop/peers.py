"""Runs inside the environment of other libraries (`make test-interop`), for tests/interop/test_peers.py.

    python -m tests.interop.peers versions OUT                what is installed there, as JSON
    python -m tests.interop.peers <reader> OUT FOLDER         logits that a peer computes from our folder
    python -m tests.interop.peers <writer> OUT FOLDER         a folder that a peer wrote, and in OUT the weights it means

Nothing here imports woq: what is read was read by the peer alone.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.tiny_models import TINY_ARCHITECTURES, VOCABULARY

PACKAGES = (
    "torch", "transformers", "compressed-tensors", "bitsandbytes", "hqq", "torchao", "auto-round", "gguf", "xllamacpp",
    "gptqmodel",
)  # fmt: skip


def token_ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))


def versions(out: Path, _: Path) -> None:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    out.write_text(json.dumps(found))


# --- peers that read our folders ---------------------------------------------------------------------------------


def through_transformers(out: Path, folder: Path) -> None:
    """Plain transformers, with whatever quantizer it finds for the folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu").eval()
    with torch.no_grad():
        save_file({"logits": model(token_ids()).logits.float().contiguous()}, out)


def through_compressed_tensors(out: Path, folder: Path) -> None:
    """Each layer through the library's own decompressor, as transformers calls it: its zero points included.

    (transformers 5.23 with compressed-tensors 0.20 loads no asymmetric folder, theirs or ours: the skeleton that it
    makes has zero points of the unpacked shape.)
    """
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    raw = json.loads((folder / "config.json").read_text())["quantization_config"]
    raw.pop("quant_method")
    (scheme,) = QuantizationConfig.model_validate(raw).config_groups.values()
    tensors, layers = load_file(folder / "model.safetensors"), dict[str, dict[str, Tensor]]()
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if f"{layer}.weight_packed" in tensors:
            layers.setdefault(layer, {})[part] = tensor
    save_file(
        {n: PackedQuantizationCompressor.decompress(t, scheme)["weight"].float() for n, t in layers.items()},
        out,
    )


def through_llama_cpp(out: Path, file: Path) -> None:
    """llama.cpp's own server on a GGUF file: how many tokens each prompt has, and its greedy continuation."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.warmup = 256, False
    server = xllamacpp.Server(parameters)
    answers = []
    for prompt in json.loads((file.parent / "prompts.json").read_text()):
        answer = server.handle_completions({"prompt": prompt, "max_tokens": 24, "temperature": 0.0})
        answers.append((answer["usage"]["prompt_tokens"], answer["choices"][0]["text"]))
    out.write_text(json.dumps(answers))


# --- peers that write folders for us ------------------------------------------------------------------------------


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    return {
        n: m
        for n, m in model.named_modules()
        if n.startswith("model.layers.") and hasattr(m, "weight") and m.weight.dim() == 2
    }


def _float_folder(folder: Path) -> Path:
    """The tiny Llama in float, beside the folder that is to be written."""
    source = folder.with_name(f"{folder.name}-float")
    TINY_ARCHITECTURES["llama"]().save_pretrained(source)
    return source


def _bitsandbytes(out: Path, folder: Path, **how: Any) -> None:
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(**how)
    source = _float_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weights[name] = bnb.functional.dequantize_4bit(
                module.weight.data, module.weight.quant_state
            ).float()
        elif isinstance(module, bnb.nn.Linear8bitLt):
            weights[name] = module.weight.data.float() * module.weight.SCB.float().unsqueeze(1) / 127
    model.save_pretrained(folder)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, out)


def bnb_nf4(out: Path, folder: Path) -> None:
    _bitsandbytes(out, folder, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def bnb_fp4(out: Path, folder: Path) -> None:
    _bitsandbytes(out, folder, load_in_4bit=True, bnb_4bit_quant_type="fp4")


def bnb_int8(out: Path, folder: Path) -> None:
    _bitsandbytes(out, folder, load_in_8bit=True)


def hqq(out: Path, folder: Path) -> None:
    """Layers by hqq's own class, saved as transformers saves them: settings as tensors."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = TINY_ARCHITECTURES["llama"]()
    tensors, weights = dict(model.state_dict()), {}
    for i, (name, linear) in enumerate(_linears(model).items()):
        config = BaseQuantizeConfig(nbits=(4, 8, 3, 2)[i % 4], group_size=32, axis=(1, 0)[i // 4 % 2])
        layer = HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
        weights[name] = layer.dequantize().float()
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": tensor for part, tensor in layer.state_dict().items()}
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({n: t.detach().clone().contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    save_file({n: w.contiguous() for n, w in weights.items()}, out)


def torchao(out: Path, folder: Path) -> None:
    """Signed 4-bit codes through transformers, the form that torchao makes on any device."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup
    from transformers import AutoModelForCausalLM, TorchAoConfig

    config = TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    source = _float_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    weights = {name: module.weight.dequantize().float() for name, module in _linears(model).items()}
    model.save_pretrained(folder)
    save_file({n: w.detach().contiguous() for n, w in weights.items()}, out)


def _compressed_tensors(out: Path, folder: Path, bits: int) -> None:
    """compressed-tensors' own packing of 3-bit, 4-bit and 8-bit codes, asymmetric, groups of 32."""
    from compressed_tensors.compressors import pack_to_int32

    model = TINY_ARCHITECTURES["llama"]()
    tensors, weights = dict(model.state_dict()), {}
    generator = torch.Generator().manual_seed(bits)
    half = 1 << (bits - 1)
    for name, linear in _linears(model).items():
        rows, columns = linear.weight.shape  # type: ignore[union-attr, misc]
        codes = torch.randint(-half, half, (rows, columns), generator=generator, dtype=torch.int8)
        zeros = torch.randint(-half, half, (rows, columns // 32), generator=generator, dtype=torch.int8)
        scales = (torch.rand(rows, columns // 32, generator=generator) + 0.5) / 16
        wide = (codes.float() - zeros.float().repeat_interleave(32, 1)) * scales.repeat_interleave(32, 1)
        del tensors[f"{name}.weight"]
        weights[name] = wide
        tensors |= {
            f"{name}.weight_packed": pack_to_int32(codes, bits),
            f"{name}.weight_zero_point": pack_to_int32(zeros, bits, packed_dim=0),
            f"{name}.weight_scale": scales,
            f"{name}.weight_shape": torch.tensor([rows, columns]),
        }
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    scheme = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file({n: t.detach().clone().contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    save_file({n: w.contiguous() for n, w in weights.items()}, out)


def ct_3bit(out: Path, folder: Path) -> None:
    _compressed_tensors(out, folder, 3)


def ct_4bit(out: Path, folder: Path) -> None:
    _compressed_tensors(out, folder, 4)


def ct_8bit(out: Path, folder: Path) -> None:
    _compressed_tensors(out, folder, 8)


MODES: dict[str, Callable[[Path, Path], None]] = {
    function.__name__: function
    for function in (
        versions, through_transformers, through_compressed_tensors, through_llama_cpp, bnb_nf4, bnb_fp4, bnb_int8, hqq, torchao, ct_3bit, ct_4bit, ct_8bit,
    )
}  # fmt: skip

if __name__ == "__main__":
    MODES[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
