"""What neural-compressor's example scripts call, with one changed import, on a tiny model in place of the real one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.interop.folders import make_folder
from tests.interop.foreign_writers import gptq as optimum_layout
from tests.tiny_models import VOCABULARY
from woq.compat.neural_compressor.torch.quantization import (
    AutoRoundConfig,
    AWQConfig,
    GPTQConfig,
    RTNConfig,
    TEQConfig,
    TorchConfig,
    TuningConfig,
    autotune,
    convert,
    get_woq_tuning_config,
    load,
    prepare,
    quantize,
    save,
)
from woq.compat.neural_compressor.torch.utils import (
    get_double_quant_config_dict,
    get_model_device,
    move_input_device,
)
from woq.compat.neural_compressor.transformers import AutoModelForCausalLM
from woq.compat.neural_compressor.transformers import AwqConfig as HfAwq
from woq.compat.neural_compressor.transformers import GPTQConfig as HfGptq
from woq.compat.neural_compressor.transformers import RtnConfig as HfRtn
from woq.compat.neural_compressor.transformers import TeqConfig as HfTeq
from woq.configs import ConfigWarning
from woq.errors import CalibrationError, ConfigError
from woq.linear import QuantLinear

pytestmark = pytest.mark.filterwarnings("ignore::woq.calibration.CalibrationWarning")
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def source(stories260k: Path, tmp_path: Path) -> Path:
    """A folder with a random Llama, a tokenizer, and a data set of texts beside it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "float")
    for file in stories260k.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "float")
    texts = [{"text": f"Once upon a time there were {i} little dogs. " * 8} for i in range(12)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return tmp_path / "float"


# --- neural_compressor.transformers --------------------------------------------------------------------------------


SCRIPT: dict[str, Callable[[Any, str], Any]] = {
    "Rtn": lambda _, __: HfRtn(
        bits=4, sym=True, group_size=64, compute_dtype=None, scale_dtype="fp32", weight_dtype="int4",
        use_layer_wise=None, quant_lm_head=False,
    ),
    "GPTQ": lambda tokenizer, data: HfGptq(
        tokenizer=tokenizer, dataset=data, bits=8, desc_act=True, damp_percent=0.01, sym=False, blocksize=128,
        static_groups=False, use_mse_search=False, group_size=32, n_samples=4, seq_len=32, batch_size=8,
        compute_dtype=None, scale_dtype="bf16", weight_dtype="int8", use_layer_wise=True, true_sequential=False,
        quant_lm_head=False,
    ),
    "Awq": lambda tokenizer, data: HfAwq(
        tokenizer=tokenizer, dataset=data, bits=4, zero_point=True, group_size=32, seq_len=32, n_samples=4,
        batch_size=8, scale_dtype="fp32", weight_dtype="int4", quant_lm_head=True,
    ),
    "Teq": lambda tokenizer, data: HfTeq(
        tokenizer=tokenizer, dataset=data, bits=4, sym=False, group_size=32, seq_len=32, batch_size=8, n_samples=4,
        scale_dtype="fp32", weight_dtype="int4", iters=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("algorithm", SCRIPT)
def test_the_generation_script(algorithm: str, source: Path, tmp_path: Path) -> None:
    """Its calls in their order: quantize, save, load the folder with the same config beside, generate."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    config = SCRIPT[algorithm](tokenizer, str(tmp_path / "texts.jsonl"))
    model = AutoModelForCausalLM.from_pretrained(
        str(source), quantization_config=config, trust_remote_code=False, _commit_hash=None, for_inference=False,
        device_map="cpu",
    )  # fmt: skip
    model.save_pretrained(str(tmp_path / "saved"))
    tokenizer.save_pretrained(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(
        str(tmp_path / "saved"), quantization_config=config, trust_remote_code=False, _commit_hash=None,
        device_map="cpu",
    )  # fmt: skip
    layers = [m for m in again.modules() if isinstance(m, QuantLinear)]
    assert len(layers) == 14 + (algorithm == "Awq")
    settings = {(m.spec.bits, m.spec.group_size, m.spec.desc_act, m.spec.scale_dtype) for m in layers}
    assert (
        settings
        == {
            "Rtn": {(4, 64, False, torch.float32)},
            "GPTQ": {(8, 32, True, torch.bfloat16)},
            "Awq": {(4, 32, False, torch.float32)},
            "Teq": {(4, 32, False, torch.float32)},
        }[algorithm]
    )
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    ids = tokenizer(["Once upon a time"] * 2, return_tensors="pt").input_ids
    told = again.generate(ids, max_new_tokens=4, do_sample=False, num_beams=2)
    assert len(tokenizer.batch_decode(told, skip_special_tokens=True)) == 2


@pytest.mark.parametrize("bits", [4, 8])
def test_load_in_bits(bits: int, source: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        str(source), device_map="cpu", **{f"load_in_{bits}bit": True}
    )
    specs = [m.spec for m in model.modules() if isinstance(m, QuantLinear)]
    assert {(spec.bits, spec.group_size, spec.sym) for spec in specs} == {(bits, 32, True)}
    with pytest.raises(ConfigError, match="one of the three"):
        AutoModelForCausalLM.from_pretrained(str(source), load_in_4bit=True, quantization_config=HfRtn())


def test_the_configs_have_its_defaults() -> None:
    assert (HfRtn().bits, HfRtn().group_size, HfRtn().sym) == (4, 32, True)
    config = HfGptq()
    assert (config.group_size, config.damp_percent, config.dataset) == (32, 0.1, "NeelNanda/pile-10k")
    assert not HfAwq().sym and HfAwq(zero_point=False).sym and HfAwq(sym=True).sym
    assert HfTeq(folding=False).folding
    with pytest.warns(ConfigWarning, match="weight_dtype='int4' does nothing beside bits=8"):
        assert HfRtn(bits=8, weight_dtype="int4").bits == 8
    with pytest.raises(ConfigError, match="damp_percent"):
        HfGptq(damp_percent=2.0)
    with pytest.raises(ConfigError, match="grup_size"):
        HfRtn(grup_size=32)


# --- neural_compressor.torch ---------------------------------------------------------------------------------------


def batches(count: int = 6, length: int = 20) -> DataLoader[Any]:
    """As its example's loader: one row and its last position."""
    rows = torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(5))
    return DataLoader([(row, length - 1) for row in rows], batch_size=1)  # type: ignore[arg-type]


def run_fn(model: nn.Module, loader: DataLoader[Any]) -> None:
    for batch in loader:
        batch = move_input_device(batch, device=get_model_device(model))
        model(batch[0])


COMMON: dict[str, Any] = {"dtype": "int", "bits": 4, "use_sym": False, "group_size": 32}
DOUBLE: dict[str, Any] = {
    "use_double_quant": False,
    "double_quant_bits": 8,
    "double_quant_dtype": "fp32",
    "double_quant_use_sym": True,
    "double_quant_group_size": 256,
    "quant_lm_head": False,
}
TORCH: dict[str, Callable[[], TorchConfig]] = {
    "RTN": lambda: RTNConfig(
        **COMMON, **DOUBLE, group_dim=1, use_full_range=False, use_mse_search=False, use_layer_wise=False
    ),
    "GPTQ": lambda: GPTQConfig(
        **COMMON, **DOUBLE, use_mse_search=False, percdamp=0.05, act_order=False, hybrid_order=False, fp8_aware=False,
        block_size=128, static_groups=False, use_layer_wise=False, use_block_wise=False,
    ),
    "AWQ": lambda: AWQConfig(**COMMON, group_dim=1, use_auto_scale=True, use_auto_clip=True, absorb_layer_dict={}),
    "TEQ": lambda: TEQConfig(**COMMON, group_dim=1, iters=1),
    "AutoRound": lambda: AutoRoundConfig(
        **COMMON, enable_quanted_input=True, lr=None, minmax_lr=None, seqlen=20, nsamples=4, iters=2, init="rtn"
    ).set_local("lm_head", AutoRoundConfig(dtype="fp32")),
}  # fmt: skip


@pytest.mark.parametrize("algorithm", TORCH)
def test_the_torch_script(algorithm: str, tiny_model: Callable[[str], nn.Module], tmp_path: Path) -> None:
    """prepare, calibrate in the user's own loop, convert, save in both formats, load with the float model at hand."""
    model: Any = tiny_model("llama")
    expected = model(IDS).logits
    model = prepare(
        model=model, quant_config=TORCH[algorithm](), example_inputs=torch.ones([1, 20], dtype=torch.long)
    )
    if algorithm != "RTN":
        run_fn(model, batches())
    assert torch.equal(model(IDS).logits, expected)  # until it is converted, it is the float model
    model = convert(model)
    assert model.is_quantized and not model._forward_pre_hooks
    specs = {(m.spec.bits, m.spec.group_size) for m in model.modules() if isinstance(m, QuantLinear)}
    assert specs == {(4, 32)}
    for form in ("default", "huggingface"):
        model.save(tmp_path / form, format=form)
        again = load(tmp_path / form, tiny_model("llama"), format=form, device="cpu")
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_one_call(tiny_model: Callable[[str], nn.Module], tmp_path: Path) -> None:
    """`quantize` is the same as the three steps, and leaves the model alone where it is told to."""
    float_model: Any = tiny_model("llama")
    config = {"gptq": {"bits": 4, "group_size": 32, "use_sym": True}}
    one = quantize(float_model, config, run_fn, run_args=(batches(),), inplace=False)
    assert not any(isinstance(m, QuantLinear) for m in float_model.modules())
    three: Any = prepare(tiny_model("llama"), GPTQConfig(use_sym=True))
    run_fn(three, batches())
    assert torch.equal(convert(three)(IDS).logits, one(IDS).logits)
    save(one, tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_calibration_is_what_the_model_was_run_on(tiny_model: Callable[[str], nn.Module]) -> None:
    model: Any = prepare(tiny_model("llama"), GPTQConfig(bits=4))
    mask = torch.tensor([[1, 1, 1, 0]])
    model(input_ids=IDS, attention_mask=mask)
    model(torch.cat([IDS, IDS]))
    assert [row.tolist() for row in model.woq_calibration.rows] == [[5, 6, 7], [5, 6, 7, 8], [5, 6, 7, 8]]
    config = convert(model).quantization_report.config
    assert (config.num_samples, config.seq_len, config.padding) == (3, 4, True)


def test_what_is_refused(tiny_model: Callable[[str], nn.Module], tmp_path: Path) -> None:
    model: Any = tiny_model("llama")
    with pytest.raises(ConfigError, match="not prepared"):
        convert(model)
    with pytest.raises(CalibrationError, match="GPTQConfig was given nothing to calibrate on"):
        convert(model, GPTQConfig())
    with pytest.raises(ConfigError, match="one algorithm for a model"):
        RTNConfig().set_local(".*", GPTQConfig())
    with pytest.raises(ConfigError, match="double_quant"):
        GPTQConfig(use_double_quant=True)
    with pytest.raises(ConfigError, match=re.escape("dtype = 'fp32' quantizes nothing")):
        RTNConfig(dtype="fp32").to_woq()
    with pytest.raises(ConfigError, match="group_dim"):
        RTNConfig(group_dim=0)
    with pytest.raises(ConfigError, match=r"quant_config is \{'hqq'"):
        prepare(model, {"hqq": {}})
    prepare(model, RTNConfig())
    with pytest.raises(ConfigError, match="prepared already"):
        prepare(model, RTNConfig())
    with pytest.raises(ConfigError, match="format='vllm'"):
        save(model, tmp_path, format="vllm")
    with pytest.warns(ConfigWarning, match="folding=False does nothing"):
        AWQConfig(folding=False)


def test_settings_by_layer(tiny_model: Callable[[str], nn.Module]) -> None:
    config = RTNConfig(group_size=32)
    config.set_local(".*down_proj", RTNConfig(bits=8, use_sym=False)).set_local(
        ".*o_proj", RTNConfig(dtype="fp32")
    )
    model = convert(tiny_model("llama"), config)
    specs = {
        name.rpartition(".")[2]: m.spec for name, m in model.named_modules() if isinstance(m, QuantLinear)
    }
    assert "o_proj" not in specs and len(specs) == 6
    assert (specs["down_proj"].bits, specs["down_proj"].group_size, specs["down_proj"].sym) == (8, 32, False)
    assert (specs["q_proj"].bits, specs["q_proj"].sym) == (4, True)


@pytest.mark.parametrize("kind", ["BNB_NF4", "GGML_TYPE_Q4_K"])
def test_double_quant(kind: str, tiny_model: Callable[[str], nn.Module]) -> None:
    fields = get_double_quant_config_dict(kind)
    fields.update({"use_full_range": False, "use_mse_search": False, "quant_lm_head": False})
    model = convert(tiny_model("llama"), RTNConfig.from_dict(fields))
    spec = next(m.spec for m in model.modules() if isinstance(m, QuantLinear))
    assert spec.double_quant is not None
    assert spec.data_type == ("nf4" if kind == "BNB_NF4" else "int")
    with pytest.raises(ConfigError, match="double_quant_type='Q4'"):
        get_double_quant_config_dict("Q4")


def test_autotune(tiny_model: Callable[[str], nn.Module]) -> None:
    float_model: Any = tiny_model("llama")
    reference = float_model(IDS).logits.detach()
    tried: list[int] = []

    def eval_fn(model: Any, of: Tensor) -> float:
        layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
        tried.append(layers[0].spec.bits if layers else 16)
        return 1 - float((model(IDS).logits - of).detach().norm() / of.norm())

    set_of_two = RTNConfig(bits=[2, 8, 4], use_sym=True)
    found = autotune(float_model, TuningConfig(set_of_two, tolerable_loss=0.05), eval_fn, eval_args=reference)
    assert tried == [16, 2, 8]
    assert next(m for m in found.modules() if isinstance(m, QuantLinear)).spec.bits == 8
    worst = TuningConfig([RTNConfig(bits=2), GPTQConfig(bits=3)], tolerable_loss=0)
    best = autotune(float_model, worst, eval_fn, (reference,), run_fn, (batches(),))
    assert next(m for m in best.modules() if isinstance(m, QuantLinear)).spec.bits == 3
    with pytest.raises(ConfigError, match="config_set is empty"):
        TuningConfig().configs()
    assert [config.name for config in get_woq_tuning_config()] == ["rtn", "autoround", "gptq", "awq"]


def test_loads_its_own_folders(tiny_model: Callable[[str], nn.Module], tmp_path: Path) -> None:
    """`quantized_weight.pt` and qconfig.json, no config.json: the float model gives it."""
    names = [
        name
        for name, m in tiny_model("llama").named_modules()
        if isinstance(m, nn.Linear) and "lm_head" not in name
    ]
    settings = {"gptq": {"dtype": "int", "bits": 4, "group_size": 32}}
    qconfig = {str((name, "Linear")): settings for name in names}
    expected = make_folder(
        tmp_path,
        lambda w: optimum_layout(w, 1),
        description=("qconfig.json", qconfig),
        file="quantized_weight.pt",
    )
    (tmp_path / "config.json").unlink()
    model = load(tmp_path, original_model=tiny_model("llama"))
    torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-4)
    assert not (tmp_path / "config.json").exists()
