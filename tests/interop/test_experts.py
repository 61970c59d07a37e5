"""Folders of others with experts one by one, which transformers' modules hold fused and under other names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM as Plain

from tests.interop import foreign_writers as foreign
from tests.interop.folders import logits, quantized_by_hand, save
from tests.interop.test_folders import CT
from tests.tiny_models import TINY_ARCHITECTURES
from woq import AutoModelForCausalLM, RtnConfig, WoqConfig, quantize_folder
from woq.errors import CheckpointError
from woq.inspection import inspect_folder
from woq.interop.convert import convert
from woq.interop.names import Naming
from woq.linear import QuantLinear
from woq.progress import Progress

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
WRITERS: dict[str, tuple[Callable[[foreign.Plain], dict[str, Tensor]], dict[str, Any]]] = {
    "gptq": (lambda w: foreign.gptq(w, 1), GPTQ),
    "awq": (foreign.awq_gemm, AWQ),
    "compressed-tensors": (foreign.compressed_tensors, CT),
}
# How checkpoints call an expert's linears: gate, up, down; and the module around them.
NAMES = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


def foreign_moe(
    folder: Path,
    arch: str,
    write: Callable[[foreign.Plain], dict[str, Tensor]],
    config: dict[str, Any],
    edit: Callable[[dict[str, Tensor]], None] = lambda tensors: None,
) -> nn.Module:
    """A folder as others write it, experts one by one under the checkpoints' names; returns the float model it means."""
    model = TINY_ARCHITECTURES[arch]()
    block, gate, up, down = NAMES[arch]
    tensors: dict[str, Tensor] = {}

    def put(stored: str, weight: Tensor) -> Tensor:
        plain = quantized_by_hand(weight.detach())
        tensors.update({f"{stored}.{part}": tensor for part, tensor in write(plain).items()})
        return plain.dequantize()

    for name, parameter in model.named_parameters():
        path = name.replace(".mlp.", f".{block}.") if arch == "mixtral" else name
        module = path.removesuffix(".weight")
        if name.endswith("experts.gate_up_proj"):
            for e in range(parameter.shape[0]):
                halves = parameter.data[e].chunk(2)
                own = path.removesuffix("gate_up_proj") + str(e)
                stacked = [put(f"{own}.{p}", half) for p, half in zip((gate, up), halves, strict=True)]
                parameter.data[e] = torch.cat(stacked)
        elif name.endswith("experts.down_proj"):
            for e in range(parameter.shape[0]):
                parameter.data[e] = put(path.removesuffix("down_proj") + f"{e}.{down}", parameter.data[e])
        elif isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear) and "layers" in name:
            parameter.data = put(module, parameter.data)
        else:
            tensors[path] = parameter.detach().clone()
    edit(tensors)
    save(model, folder, tensors, config, None, "model.safetensors")
    return model


@pytest.mark.parametrize("arch", NAMES)
@pytest.mark.parametrize("writer", WRITERS)
def test_reads_experts_one_by_one(writer: str, arch: str, tmp_path: Path) -> None:
    expected = foreign_moe(tmp_path / "foreign", arch, *WRITERS[writer])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "foreign", device_map="cpu", dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)
    facts = inspect_folder(tmp_path / "foreign")
    assert facts.format == writer
    assert not [oddity for oddity in facts.oddities if "will not load" in oddity]
    layers = sum(isinstance(m, QuantLinear) for m in model.modules())
    assert sum(kind.layers for kind in facts.kinds) == layers
    saved_and_loaded_again(model, tmp_path / "ours")


def saved_and_loaded_again(model: Any, folder: Path) -> None:
    """In our own format, whose names nobody else knows: it says so."""
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))
    assert again.config.quantization_config["quant_method"] == "woq"


def test_plain_transformers_reads_them(tmp_path: Path) -> None:
    expected = foreign_moe(tmp_path, "mixtral", *WRITERS["gptq"])
    model = Plain.from_pretrained(tmp_path, quantization_config=WoqConfig(), dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("to", ["gptq", "awq", "compressed-tensors"])
@pytest.mark.parametrize("arch", NAMES)
def test_writes_the_names_that_others_know(arch: str, to: str, tmp_path: Path) -> None:
    """Our own folder, converted: the tensors are exactly those that the writer by hand has, and mean the same."""
    TINY_ARCHITECTURES[arch]().save_pretrained(tmp_path / "float")
    config = RtnConfig(group_size=32, search="minmax")
    quantize_folder(tmp_path / "float", tmp_path / "ours", config, progress=Progress())
    convert(tmp_path / "ours", tmp_path / "theirs", to)
    foreign_moe(tmp_path / "by hand", arch, *WRITERS[to])
    names, by_hand = (load_file(tmp_path / f / "model.safetensors").keys() for f in ("theirs", "by hand"))
    optional = (".g_idx", ".weight_zero_point")  # of symmetric layers, and of layers without act-order
    assert {n for n in names if not n.endswith(optional)} == {n for n in by_hand if not n.endswith(optional)}
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", device_map="cpu", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", device_map="cpu", dtype=torch.float32)
    assert torch.equal(logits(ours), logits(theirs))


def test_a_converted_folder_of_others_keeps_its_names(tmp_path: Path) -> None:
    foreign_moe(tmp_path / "foreign", "mixtral", *WRITERS["gptq"])
    convert(tmp_path / "foreign", tmp_path / "v2", "gptq_v2")
    first, second = (load_file(tmp_path / f / "model.safetensors") for f in ("foreign", "v2"))
    assert first.keys() == second.keys() - {n for n in second if n.endswith(".g_idx")} | {
        n for n in first if n.endswith(".g_idx")
    }
    assert all(torch.equal(first[n], second[n]) for n in first if n.endswith((".qweight", ".scales")))


def test_experts_in_float(tmp_path: Path) -> None:
    """Attention quantized, experts not: their floats are stacked the same way."""

    def widen(tensors: dict[str, Tensor]) -> None:
        for name in [
            n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight") and "experts" in n
        ]:
            parts = {
                p: tensors.pop(f"{name}.{p}")
                for p in ("qweight", "qzeros", "scales", "g_idx")
                if f"{name}.{p}" in tensors
            }
            tensors[f"{name}.weight"] = by_hand(parts)

    expected = foreign_moe(tmp_path, "mixtral", *WRITERS["gptq"], edit=widen)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 8


def by_hand(parts: dict[str, Tensor]) -> Tensor:
    """The float weight of a GPTQ v1 layer of 4 bits in groups of 32."""
    words, scales = parts["qweight"], parts["scales"].float()
    codes = torch.stack([words[k // 8] >> 4 * (k % 8) & 15 for k in range(words.shape[0] * 8)])
    zeros = (
        torch.stack([parts["qzeros"][:, n // 8] >> 4 * (n % 8) & 15 for n in range(words.shape[1])], 1) + 1
    )
    group = torch.arange(len(codes)) // 32
    return ((codes - zeros[group]) * scales[group]).t().contiguous()


def test_half_an_expert(tmp_path: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if "layers.1" in n and "experts.2.w3" in n]:
            del tensors[name]

    foreign_moe(tmp_path, "mixtral", *WRITERS["gptq"], edit=drop)
    with pytest.raises(CheckpointError, match=r"experts\.2\.gate_up_proj' only .*experts\.2\.w1"):
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")


def test_orders_that_differ(tmp_path: Path) -> None:
    """Two linears on one input in two activation orders are no one matrix."""

    def reorder(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.0.block_sparse_moe.experts.1.w3.g_idx"
        tensors[name] = (torch.arange(64) // 32).flip(0).to(torch.int32)

    foreign_moe(tmp_path, "mixtral", *WRITERS["gptq"], edit=reorder)
    with pytest.raises(CheckpointError, match=r"experts\.1\.gate_up_proj.*their g_idx differs"):
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_names_go_there_and_back(arch: str) -> None:
    """Every tensor that transformers would save, by its stored name; what is not renamed keeps its name."""
    model = TINY_ARCHITECTURES[arch]()
    naming = Naming(model)
    for name in model.state_dict():
        for place, stored in enumerate(naming.their_tensor(name)):
            assert naming.our_tensor(stored) == (name, place)
    if arch in NAMES:
        assert naming.theirs("model.layers.1.mlp.experts.3.gate_up_proj") == tuple(
            f"model.layers.1.{NAMES[arch][0]}.experts.3.{projection}" for projection in NAMES[arch][1:3]
        )
