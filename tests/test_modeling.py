"""The door: what was quantized is what is loaded, on every architecture and in every format that is claimed."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPTQConfig as TransformersGPTQConfig

from tests.test_weights import read_gptq
from tests.tiny_models import TINY_ARCHITECTURES, VOCABULARY
from woq import (
    AutoModelForCausalLM,
    GPTQConfig,
    QuantConfig,
    RtnConfig,
    native,
    quantize,
    quantize_folder,
    save_pretrained,
)
from woq.blocks import linears, write_back
from woq.errors import BackendError, CheckpointError, ConfigError
from woq.linear import QuantLinear
from woq.progress import Progress
from woq.tensor_files import TensorFolder

TinyModel = Callable[[str], nn.Module]
QUIET = Progress()
LAYOUTS: list[dict[str, Any]] = [
    {},
    *(
        {"compression_dtype": w, "compression_dim": d, "packing": "inc_plain"}
        for w in ("int8", "int16", "int32", "int64")
        for d in (0, 1)
    ),
]


def token_ids(seed: int = 5) -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(seed))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(token_ids()).logits
    return result


def dequantized(arch: str, model: Any) -> Any:
    """The float model of `arch` with each quantized weight written into it: what QuantLinears must compute."""
    twin = TINY_ARCHITECTURES[arch]()
    plain = linears(twin)
    if not twin.config.tie_word_embeddings:
        plain["lm_head"] = twin.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            write_back(plain[name], module.dequantize())
    return twin


def gptq(**fields: Any) -> GPTQConfig:
    return GPTQConfig(**{"group_size": 32, "num_samples": 4, "seq_len": 24, **fields})


# --- quantize, save, load, generate ------------------------------------------------------------------------------

METHODS: dict[str, QuantConfig] = {
    "rtn": RtnConfig(group_size=32),
    "gptq": gptq(),
    "gptq-desc_act": gptq(desc_act=True, sym=False),
}
COMBINATIONS = [(arch, "rtn") for arch in TINY_ARCHITECTURES] + [
    (arch, method) for arch in ("llama", "gpt2", "mixtral", "gemma3") for method in ("gptq", "gptq-desc_act")
]


@pytest.mark.parametrize(("arch", "method"), COMBINATIONS)
def test_reloaded_is_quantized(arch: str, method: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    model: Any = tiny_model(arch)
    quantize(model, METHODS[method], [token_ids(1), token_ids(2)] if method != "rtn" else None)
    save_pretrained(model, tmp_path / "q")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "q", device_map="cpu")
    expected = logits(model)
    assert torch.equal(logits(loaded), expected)
    assert torch.allclose(expected, logits(dequantized(arch, model)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, logits(tiny_model(arch)), atol=1e-3)  # and it is not the float model
    assert loaded.quantization_config == METHODS[method]
    # bfloat16 on the best backend: as near as bfloat16 is, by the median token and by the norm. A rounding more or less sends a
    # token of Mixtral's to another expert, which outweighs all others.
    bf16 = AutoModelForCausalLM.from_pretrained(tmp_path / "q", device_map="cpu", dtype="bfloat16")
    floats = dequantized(arch, model).to(torch.bfloat16)
    off, usual = ((logits(m).float() - expected).norm(dim=-1) for m in (bf16, floats))
    assert off.median() <= 1.5 * usual.median()
    if arch != "mixtral":
        assert off.norm() <= 3 * usual.norm() + 1e-3 * expected.norm()
    for runner in (loaded, bf16):
        out = runner.generate(token_ids()[:, :5], max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert out.shape == (2, 9)
        assert torch.equal(out[:, :5], token_ids()[:, :5])


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: "-".join(map(str, x.values())) or "gptq")
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_format(bits: int, layout: dict[str, Any], tiny_model: TinyModel, tmp_path: Path) -> None:
    for sym, group_size in itertools.product((True, False), (32, -1)):
        model: Any = tiny_model("llama")
        quantize(model, RtnConfig(bits=bits, sym=sym, group_size=group_size, search="minmax", **layout))
        folder = tmp_path / f"{sym}{group_size}"
        save_pretrained(model, folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
        assert torch.equal(logits(loaded), logits(model)), (sym, group_size)
        ours, theirs = model.state_dict(), loaded.state_dict()
        assert all(torch.equal(t, theirs[name]) for name, t in ours.items())


@pytest.mark.parametrize("scale_dtype", ["fp16", "bf16", "fp32"])
def test_scale_dtypes(scale_dtype: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    quantize(model, RtnConfig(group_size=32, scale_dtype=scale_dtype))
    save_pretrained(model, tmp_path / "q")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "q", device_map="cpu")
    assert torch.equal(logits(loaded), logits(model))


RULES: dict[str, dict[str, Any]] = {
    "skip": {"overrides": {r".*v_proj": {"skip": True}}},
    "ignore": {"ignore": ("mlp",), "min_coverage": 0.1},
    "mixed bits": {"overrides": {r".*v_proj": {"bits": 8}, r".*layers\.1\.": {"bits": 3, "group_size": -1}}},
    "mixed sym": {"overrides": {r".*v_proj": {"sym": False}}},
    "smaller": {"group_size": 64, "on_ragged_group": "smaller"},
    "pad": {"group_size": 64, "on_ragged_group": "pad"},
    "skip ragged": {"group_size": 64, "on_ragged_group": "skip"},
    "head": {"quant_lm_head": True},
    "some modules": {
        "modules_in_block_to_quantize": (("self_attn.q_proj",), ("mlp.down_proj", "mlp.up_proj"))
    },
    "first expert's down": {"overrides": {r".*experts\.0\.down_proj": {"skip": True}}},
    "no expert": {"ignore": ("experts",), "min_coverage": 0.01},
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(
    ("arch", "method"), [("llama", "rtn"), ("llama", "gptq"), ("gemma3", "rtn"), ("qwen3_moe", "gptq")]
)
def test_rules_survive(
    arch: str, rule: dict[str, Any], method: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    if "min_coverage" not in rule:
        rule = {**rule, "min_coverage": 0.2}
    config = RtnConfig(**{"group_size": 32, **rule}) if method == "rtn" else gptq(**rule)
    model: Any = tiny_model(arch)
    quantize(model, config, [token_ids(1), token_ids(2)] if method == "gptq" else None)
    save_pretrained(model, tmp_path / "q")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "q", device_map="cpu")
    assert torch.equal(logits(loaded), logits(model))
    specs = [{n: m.spec for n, m in x.named_modules() if isinstance(m, QuantLinear)} for x in (model, loaded)]
    assert specs[0] == specs[1]


# --- a folder as others see it -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "word"), [(2, 0x55555555), (3, None), (4, 0x77777777), (8, 0x7F7F7F7F)])
def test_symmetric_folder_is_a_standard_gptq_folder(
    bits: int, word: int | None, tiny_model: TinyModel, tmp_path: Path
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "float")
    config = gptq(bits=bits, overrides={r".*v_proj": {"skip": True}})
    quantize_folder(tmp_path / "float", tmp_path / "q", config, [token_ids(1), token_ids(2)], progress=QUIET)
    raw = json.loads((tmp_path / "q" / "config.json").read_text())
    own = raw["quantization_config"]
    assert own == json.loads((tmp_path / "q" / "quantize_config.json").read_text())
    expected = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": False, "sym": True}
    expected |= {"checkpoint_format": "gptq", "format": "gptq", "lm_head": False, "true_sequential": True}
    assert expected.items() <= own.items()
    assert 0 < own["damp_percent"] < 1
    assert "meta" not in own
    assert own["dynamic"] == {rf"-:^model\.layers\.{i}\.self_attn\.v_proj$": {} for i in range(2)}
    assert raw["model_type"] == "llama"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "q", device_map="cpu")
    stored = TensorFolder(tmp_path / "q")
    for name, module in loaded.named_modules():
        if isinstance(module, QuantLinear):
            read = torch.from_numpy(read_gptq(module.packed, bits, v1=True))
            assert torch.equal(read.float(), module.dequantize()), name
            assert word is None or (stored.read(f"{name}.qzeros") == word).all()
            assert stored.read(f"{name}.scales").dtype == torch.float16
            assert torch.equal(stored.read(f"{name}.g_idx"), torch.arange(module.in_features).int() // 32)
    assert "model.layers.0.self_attn.v_proj.weight" in stored.index
    assert any("v_proj" in n for n in stored.index) and not any(
        n.endswith("v_proj.qweight") for n in stored.index
    )


def test_asymmetric_is_v2_and_uncommon_widths_are_nobody_elses(tiny_model: TinyModel, tmp_path: Path) -> None:
    for fields, method, form in (
        ({"sym": False}, "gptq", "gptq_v2"),
        ({"bits": 5}, "woq", "woq_gptq"),
        ({"compression_dtype": "int8"}, "woq", "woq_inc_plain"),
    ):
        model = tiny_model("llama")
        quantize(model, RtnConfig(group_size=32, **fields))
        own: Any = model.config.quantization_config
        assert (own["quant_method"], own["checkpoint_format"], own["format"]) == (method, form, form)


def test_transformers_accepts_the_config(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    quantize(model, gptq(), [token_ids(1), token_ids(2)])
    own: Any = model.config.quantization_config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it names the keys it does not know
        theirs = TransformersGPTQConfig.from_dict(dict(own))
    assert (theirs.bits, theirs.group_size, theirs.sym, theirs.desc_act) == (4, 32, True, False)


def test_foreign_folder_without_our_key(tiny_model: TinyModel, tmp_path: Path) -> None:
    """As AutoGPTQ leaves one: no "woq", no "sym", all-zero g_idx, an old rotary buffer among the tensors."""
    model = tiny_model("llama")
    quantize(model, RtnConfig(group_size=32))
    save_pretrained(model, tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    for key in ("woq", "sym", "dynamic", "provider", "format"):
        del config["quantization_config"][key]
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    stored = load_file(tmp_path / "q" / "model.safetensors")
    for name in stored:
        if name.endswith("g_idx"):
            stored[name] = torch.zeros_like(stored[name])
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(stored, tmp_path / "q" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "q", device_map="cpu")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.quantization_config is None


# --- the doors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", ["never", "always"])
@pytest.mark.parametrize("arch", ["llama", "mixtral"])
def test_quantizing_while_loading(arch: str, offload: Any, tiny_model: TinyModel, tmp_path: Path) -> None:
    source: Any = tiny_model(arch)
    source.save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float",
        quantization_config={"quant_method": "rtn", "group_size": 32},
        device_map="cpu",
        offload=offload,
        progress=QUIET,
    )
    quantize(source, RtnConfig(group_size=32))
    assert torch.equal(logits(model), logits(source))
    assert model.quantization_config == RtnConfig(group_size=32)
    assert model.quantization_report.plan.coverage > 0.9
    model.save_pretrained(tmp_path / "q")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "q", device_map="cpu")
    assert torch.equal(logits(loaded), logits(source))
    loaded.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "quantize_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "q" / name).read_bytes(), name


def test_plain_models_load_plain(tiny_model: TinyModel, tmp_path: Path) -> None:
    model: Any = tiny_model("llama")
    model.save_pretrained(tmp_path / "float")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float", device_map="cpu")
    assert torch.equal(logits(loaded), logits(model))


def test_refusals(tiny_model: TinyModel, tmp_path: Path) -> None:
    source: Any = tiny_model("llama")
    source.save_pretrained(tmp_path / "float")
    load = AutoModelForCausalLM.from_pretrained
    quantize_folder(tmp_path / "float", tmp_path / "q", RtnConfig(group_size=32), progress=QUIET)
    with pytest.raises(ConfigError, match=r"q is quantized already"):
        load(tmp_path / "q", quantization_config=RtnConfig())
    with pytest.raises(CheckpointError, match=r"q is quantized already"):
        quantize_folder(tmp_path / "q", tmp_path / "r", RtnConfig(), progress=QUIET)
    with pytest.raises(ConfigError, match=r"takes no \['load_in_4bit'\]"):
        load(tmp_path / "q", load_in_4bit=True)
    with pytest.raises(ConfigError, match=r"runs on one device"):
        load(tmp_path / "q", device_map={"": 0})
    with pytest.raises(ConfigError, match=r"dtype='int8'"):
        load(tmp_path / "q", dtype="int8")
    with pytest.raises(BackendError, match=r"bfloat16 only"):
        load(tmp_path / "q", device_map="cpu", backend="torch")
    with pytest.raises(ConfigError, match=r"device='xpu:7' cannot be used"):
        load(tmp_path / "q", device_map="xpu:7")
    with pytest.raises(CheckpointError, match="holds no quantized layer"):
        save_pretrained(source, tmp_path / "s")
    assert not (tmp_path / "r").exists()
    assert not (tmp_path / "s").exists()


def test_a_tied_head_is_stored_once_and_tied_again(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("gemma3")
    quantize(model, RtnConfig(group_size=32))
    save_pretrained(model, tmp_path / "q")
    assert "lm_head.weight" not in TensorFolder(tmp_path / "q").index
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "q", device_map="cpu")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_checkpoints_without_a_dtype(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Old config.json files name none: the weights' own is kept."""
    tiny_model("llama").save_pretrained(tmp_path / "float")
    config = json.loads((tmp_path / "float" / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "float" / "config.json").write_text(json.dumps(config))
    quantize_folder(tmp_path / "float", tmp_path / "q", RtnConfig(group_size=32), progress=QUIET)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "q", device_map="cpu")
    model = tiny_model("llama")
    quantize(model, RtnConfig(group_size=32))
    assert torch.equal(logits(loaded), logits(model))


def test_compute_dtype_is_the_users_choice(tiny_model: TinyModel, tmp_path: Path) -> None:
    """As recorded, or as asked for, by IPEX's names too; saving and loading does not lose it."""
    missing = native.why_not("cpu")
    if missing is not None:
        pytest.skip(f"no int8 activations: {missing}")
    model = tiny_model("llama")
    quantize(model, RtnConfig(group_size=32, compute_dtype="int8"), progress=QUIET)
    save_pretrained(model, tmp_path / "q")

    def load(**asked: Any) -> Tensor:
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "q", device_map="cpu", dtype="float32", **asked
        )
        assert {m.backend for m in loaded.modules() if isinstance(m, QuantLinear)} == {"cpu"}
        return logits(loaded)

    exact, recorded = load(compute_dtype=None), load()
    assert 0 < (recorded - exact).norm() < 0.1 * exact.norm()
    assert torch.equal(load(compute_dtype="INT8"), recorded)
    for name in ("none", "NONE", "fp32", "BF16", "fp16"):
        assert torch.equal(load(compute_dtype=name), exact)
    with pytest.raises(ConfigError, match=r"compute_dtype='int4'\n.*int8.*none"):
        load(compute_dtype="int4")
