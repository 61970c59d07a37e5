"""bitsandbytes, HQQ and torchao layers: read as what independent writers of their layouts meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from tests.interop import codebook_writers as foreign
from tests.interop.folders import ARCHITECTURE, logits, save
from tests.interop.test_layers import read
from tests.tiny_models import TINY_ARCHITECTURES
from woq import AutoModelForCausalLM, save_pretrained
from woq.blocks import linears
from woq.errors import CheckpointError
from woq.interop import reader_of
from woq.interop.base import Found, Layer
from woq.interop.convert import convert
from woq.tensor_files import TensorFolder
from woq.weights import QuantizedWeight

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
INT8 = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}
HQQ = {"quant_method": "hqq"}
SHAPES = st.sampled_from([(32, 64), (16, 96), (32, 192), (64, 32), (24, 172)])


@settings(max_examples=30, deadline=None)
@given(
    shape=SHAPES, name=st.sampled_from(["nf4", "fp4"]), block=st.sampled_from([64, 128]), nested=st.booleans()
)
def test_bitsandbytes_4bit(shape: tuple[int, int], name: str, block: int, nested: bool) -> None:
    """Blocks that end with rows, that span rows, and that straddle them."""
    tensors, weight = foreign.bnb_4bit(*shape, name, block, nested)
    got = read(BNB, tensors, shape)
    assert got.spec.data_type == name
    torch.testing.assert_close(got.dequantize(), weight, rtol=1e-6, atol=0)


def test_llm_int8() -> None:
    tensors, weight = foreign.llm_int8(32, 48)
    got = read(INT8, tensors, (32, 48))
    assert (got.spec.bits, got.spec.groups, got.spec.sym) == (8, 1, True)
    torch.testing.assert_close(got.dequantize(), weight, rtol=1e-6, atol=0)


@settings(max_examples=20, deadline=None)
@given(
    shape=st.sampled_from([(32, 64), (16, 192)]),
    bits=st.sampled_from([2, 3, 4, 8]),
    size=st.sampled_from([16, 64]),
    axis=st.sampled_from([0, 1]),
)
def test_hqq(shape: tuple[int, int], bits: int, size: int, axis: int) -> None:
    """Along axis 0, of more rows than a group has and of fewer: every weight has its scale."""
    tensors, weight = foreign.hqq(*shape, bits, size, axis=axis)
    got = read(HQQ, tensors, shape)
    assert got.spec.data_type == "int_float_zeros"
    assert got.spec.group_size == (size if axis else 1)
    assert torch.equal(got.dequantize(), weight)


def test_hqq_words_stored_as_floats_and_settings_below_meta() -> None:
    tensors, weight = foreign.hqq(32, 64, 4, 64)
    older = {"W_q": tensors["W_q"].view(torch.float16)}
    older |= {f"meta.{name}": tensor for name, tensor in tensors.items() if name != "W_q"}
    assert torch.equal(read(HQQ, older, (32, 64)).dequantize(), weight)


def read_torchao(tensors: dict[str, Tensor], told: str, folder: Path) -> QuantizedWeight:
    named = {f"a.q.{part}": tensor.contiguous() for part, tensor in tensors.items()}
    save_file(named, folder / "model.safetensors", metadata={"a.q.weight": told})
    opened = TensorFolder(folder)
    reader = reader_of(Found(folder, folder / "config.json", {"quant_method": "torchao"}, ()))
    return reader.read(Layer("a.q", 32, 128, reader.layers(opened.index)["a.q"], opened)).unpack()


@pytest.mark.parametrize("kind", ["Int4PlainInt32Tensor", "IntxUnpackedToInt8Tensor", "Int4Tensor"])
def test_torchao(kind: str, tmp_path: Path) -> None:
    tensors, weight, told = foreign.torchao(kind, 32, 128, 64)
    got = read_torchao(tensors, told, tmp_path)
    torch.testing.assert_close(got.dequantize(), weight, rtol=1e-5, atol=1e-5)
    assert (got.spec.data_type == "int") == (kind != "Int4Tensor")


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("{}", "metadata does not say what its weight is"),
        ('{"_type": "Int4TilePackedTo4dTensor", "_data": {}}', "Int4TilePackedTo4dTensor is not read"),
        ('{"_type": "Int4Tensor", "_data": {"block_size": [32, 32]}}', r"block_size is \[32, 32\]"),
        (
            '{"_type": "IntxUnpackedToInt8Tensor", "_data": {"activation_quantization": "int8"}}',
            "it quantizes or scales activations",
        ),
    ],
)
def test_torchao_that_is_not_read(told: str, message: str, tmp_path: Path) -> None:
    tensors, _, _ = foreign.torchao("Int4Tensor", 32, 128, 64)
    with pytest.raises(CheckpointError, match=rf"layer 'a\.q': .*{message}"):
        read_torchao(tensors, told, tmp_path)


def _with(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({key: change(tensors[key])})


STATE = "weight.quant_state.bitsandbytes__nf4"
BAD: list[tuple[dict[str, Any], Callable[[dict[str, Tensor]], Any], str]] = [
    (BNB, lambda t: t.pop(STATE), "no weight.quant_state"),
    (BNB, _with(STATE, lambda t: t[:9]), "is no JSON"),
    (BNB, _with("weight.quant_map", lambda t: t * 2), "quant_map is not the table of nf4"),
    (BNB, _with("weight", lambda t: t[:-1]), r"weight is torch\.uint8 \[1023, 1\]"),
    (BNB, _with("weight.absmax", lambda t: t[:-1]), r"weight\.absmax is torch\.float32 \[31\]"),
    (BNB, _with("weight.absmax", lambda t: t * float("inf")), "scales hold NaN"),
    (HQQ, _with("axis", lambda t: t * 0), r"W_q is \[16, 64\], not 64 x 32 codes"),
    (
        HQQ,
        lambda t: t.update({"axis": t["axis"] * 0, "group_size": t["group_size"] * 3}),
        "group_size 192 does not divide the weight",
    ),
    (HQQ, _with("shape", lambda t: t + 1), r"shape \[33, 65\]"),
    (HQQ, _with("W_q", lambda t: t[:-1]), r"W_q is \[15, 64\], not 32 x 64 codes"),
    (HQQ, _with("packing", lambda t: t[:3]), "packing '4bi' of 4 bits"),
    (HQQ, _with("scale", lambda t: t[:-1]), r"scale is torch\.float16 \[31, 1\]"),
    (HQQ, lambda t: t.update({"meta_zero": torch.zeros(1)}), "quantized themselves"),
    (INT8, _with("weight_format", lambda t: t + 1), "weight_format is not 0"),
    (INT8, _with("SCB", lambda t: t[1:]), r"SCB is torch\.float32 \[31\]"),
]


@pytest.mark.parametrize(("config", "damage", "message"), BAD)
def test_layers_that_do_not_fit(
    config: dict[str, Any], damage: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    made = {
        "bitsandbytes": lambda: (
            foreign.bnb_4bit(32, 64, "nf4") if config is BNB else foreign.llm_int8(32, 64)
        ),
        "hqq": lambda: foreign.hqq(32, 64, 4, 64),
    }
    tensors, _ = made[config["quant_method"]]()
    damage(tensors)
    with pytest.raises(CheckpointError, match=rf"layer 'a\.q': .*{message}"):
        read(config, tensors, (32, 64))


# --- whole folders -----------------------------------------------------------------------------------------------

FOLDERS: dict[str, tuple[dict[str, Any], Callable[[int, int], tuple[dict[str, Tensor], Tensor]]]] = {
    "bitsandbytes": (BNB, lambda n, k: foreign.bnb_4bit(n, k, "nf4", 32, True, seed=n + k)),
    "bitsandbytes-int8": (INT8, lambda n, k: foreign.llm_int8(n, k, seed=n + k)),
    "hqq": (HQQ, lambda n, k: foreign.hqq(n, k, 4, 32, seed=n + k)),
    "hqq, axis 0": (
        {**HQQ, "quant_config": {"weight_quant_params": {"axis": 0}}},
        lambda n, k: foreign.hqq(n, k, 4, 32, seed=n + k, axis=0),
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_load_run_and_are_saved_in_our_format(name: str, tmp_path: Path) -> None:
    config, write = FOLDERS[name]
    model = TINY_ARCHITECTURES[ARCHITECTURE]()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for own, linear in linears(model.get_submodule("model.layers")).items():
        made, weight = write(*linear.weight.shape)
        full = f"model.layers.{own}"
        del tensors[f"{full}.weight"]
        scale = 0.1 / float(weight.std())  # random codes are no weights: keep the logits finite and apart
        made = {
            part: t * scale if part in ("SCB", "scale", "weight.nested_absmax") else t
            for part, t in made.items()
        }
        tensors |= {f"{full}.{part}": tensor for part, tensor in made.items()}
    save(model, tmp_path / "foreign", tensors, config, None, "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "foreign", device_map="cpu", dtype=torch.float32)
    save_pretrained(loaded, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", device_map="cpu", dtype=torch.float32)
    assert torch.equal(logits(again), logits(loaded))
    if name != "bitsandbytes-int8":
        with pytest.raises(CheckpointError, match="only whole numbers can be told"):
            convert(tmp_path / "foreign", tmp_path / "gptq", "gptq")


@pytest.mark.parametrize("name", ["bitsandbytes", "bitsandbytes-int8"])
def test_a_float_folder_of_that_name_is_refused(name: str, tmp_path: Path) -> None:
    model = TINY_ARCHITECTURES[ARCHITECTURE]()
    save(model, tmp_path, dict(model.state_dict()), FOLDERS[name][0], None, "model.safetensors")
    with pytest.raises(CheckpointError, match="no quantized layer is there"):
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
