"""bits="auto:...": within the budget, served as one, recorded so that it reloads, and better than what lies between."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM as Plain

from benchmarks.quality import dequantized
from tests.tiny_models import TINY_ARCHITECTURES, VOCABULARY
from woq import AutoModelForCausalLM, GPTQConfig, QuantConfig, RtnConfig, quantize, quantize_folder
from woq.blocks import find_blocks, linears
from woq.configs import CONFIGS, config_from_dict
from woq.errors import ConfigError
from woq.evaluation import compare
from woq.linear import QuantLinear
from woq.progress import Progress
from woq.report import Report
from woq.saving import save_pretrained

TinyModel = Callable[[str], nn.Module]
QUIET = Progress()
IDS = torch.randint(3, VOCABULARY, (16, 32), generator=torch.Generator().manual_seed(3))
pytestmark = pytest.mark.filterwarnings("ignore:.*samples:UserWarning")


def config_of(method: str = "rtn", **fields: Any) -> QuantConfig:
    data = {} if method == "rtn" else {"num_samples": 16, "seq_len": 32}
    return CONFIGS[method](**{"bits": "auto:3.5", "group_size": 32, **data, **fields})


def quantized(arch: str, config: QuantConfig) -> tuple[nn.Module, Report]:
    model = TINY_ARCHITECTURES[arch]()
    return model, quantize(model, config, [IDS], device="cpu")


def widths(report: Report) -> dict[str, int]:
    return {layer.layer: layer.bits for layer in report.layers}


def average(report: Report, arch: str) -> float:
    """Bits a weight of the blocks, counted from the float model's own linears."""
    path, blocks = find_blocks(TINY_ARCHITECTURES[arch]())
    sizes = {f"{path}.{i}.{n}": m.weight.numel() for i, b in enumerate(blocks) for n, m in linears(b).items()}
    chosen = {name: bits for name, bits in widths(report).items() if name in sizes}
    return sum(sizes[n] * bits for n, bits in chosen.items()) / sum(sizes[n] for n in chosen)


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_the_average_is_within_the_budget_and_shared_inputs_share_a_width(arch: str, tmp_path: Path) -> None:
    model, report = quantized(arch, config_of())
    found, choice = widths(report), report.mixed_precision
    assert choice is not None and choice.asked == 3.5
    assert len(set(found.values())) > 1
    assert choice.average == pytest.approx(average(report, arch), abs=1e-4)
    assert 3.0 < choice.average <= 3.5
    by_unit: dict[str, set[int]] = {}
    for name, bits in found.items():
        unit = re.sub(r"\b[qkv]_proj", "qkv", re.sub(r"\b(gate|up)_proj", "gate_up", name))
        by_unit.setdefault(re.sub(r"experts\.\d+", "experts", unit), set()).add(bits)
    assert all(len(bits) == 1 for bits in by_unit.values()), by_unit
    save_pretrained(model, tmp_path / "m")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m", device_map="cpu")
    assert {n: m.spec.bits for n, m in again.named_modules() if isinstance(m, QuantLinear)} == found
    with torch.no_grad():
        assert torch.equal(again(IDS[:2]).logits, model(IDS[:2]).logits)
    assert all(again.quantization_config.for_layer(name).bits == bits for name, bits in found.items())


def test_gptq_in_memory_on_disk_and_offloaded_choose_the_same(tmp_path: Path) -> None:
    config = config_of("gptq", bits="auto:3.2")
    TINY_ARCHITECTURES["llama"]().save_pretrained(tmp_path / "float")
    _, report = quantized("llama", config)
    for offload in ("never", "always"):
        told = quantize_folder(
            tmp_path / "float", tmp_path / offload, config, [IDS], offload=offload, progress=QUIET
        )
        assert told.mixed_precision == report.mixed_precision and widths(told) == widths(report)
    one, two = (load_file(tmp_path / way / "model.safetensors") for way in ("never", "always"))
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    saved = json.loads((tmp_path / "never" / "quantization_report.json").read_text())
    assert saved["mixed_precision"]["average"] <= 3.2 == saved["mixed_precision"]["asked"]
    raw = json.loads((tmp_path / "never" / "config.json").read_text())["quantization_config"]
    assert isinstance(raw["bits"], int) and raw["quant_method"] == "gptq"  # a standard folder with `dynamic`
    assert {rule["bits"] for rule in raw["dynamic"].values()} | {raw["bits"]} == set(widths(report).values())


def test_measuring_leaves_the_model_as_it_was() -> None:
    """With one choice there is nothing to choose, and the bytes are those of that width."""
    one, _ = quantized("mixtral", config_of(bits="auto:3", bit_choices=(3,)))
    two, _ = quantized("mixtral", config_of(bits=3))
    states = one.state_dict(), two.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_rules_of_the_user_stand() -> None:
    rules = {
        r".*experts\.2\.down_proj": {"skip": True},
        r".*experts\.3\.": {"bits": 8},
        r".*o_proj": {"group_size": 16},
    }
    _, report = quantized("mixtral", config_of(overrides=rules, bits="auto:3.6"))
    found = {layer.layer: layer for layer in report.layers}
    assert not [name for name in found if "experts.2.down_proj" in name]
    assert {layer.bits for name, layer in found.items() if "experts.3." in name} == {8}
    assert {layer.group_size for name, layer in found.items() if "o_proj" in name} == {16}
    assert {layer.group_size for name, layer in found.items() if "o_proj" not in name} == {32}
    assert average(report, "mixtral") <= 3.6
    others = {layer.bits for name, layer in found.items() if "experts.0." in name}
    assert max(others) < 8


def test_the_head_is_no_part_of_the_budget() -> None:
    _, report = quantized("llama", config_of(quant_lm_head=True, bits="auto:3", bit_choices=(2, 3, 4)))
    assert widths(report)["lm_head"] == 4
    assert average(report, "llama") <= 3


def test_what_cannot_be_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"average of 2\.5 bits cannot be reached.*3\.000"):
        quantized("llama", config_of(bits="auto:2.5", bit_choices=(3, 4)))
    with pytest.raises(ConfigError, match=r"weight_dtype=.nf4. with bits=.auto:3\.5."):
        RtnConfig(bits="auto:3.5", weight_dtype="nf4")
    for wrong in ("auto", "auto:", "auto:9", "auto:x", "3.5"):
        with pytest.raises(ConfigError, match=r"GPTQConfig\.bits = "):
            GPTQConfig(bits=wrong)
    config = RtnConfig(bits="auto:3.5")
    assert (config.average_bits, config.widest_bits) == (3.5, 8)
    assert config_from_dict(config.to_dict()) == config


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_it_lies_under_the_line_between_3_and_4_bits(method: str, stories15m: Path, shared_dir: Path) -> None:
    tokens = load_file(shared_dir / "data" / "quality" / "stories15M.safetensors")
    model: Any = Plain.from_pretrained(stories15m, dtype=torch.float32).eval().requires_grad_(False)
    kl: dict[Any, float] = {}
    for bits in (3, 4, "auto:3.5"):
        work = copy.deepcopy(model)
        fields = {} if method == "rtn" else {"num_samples": 16, "seq_len": 256}
        quantize(
            work, CONFIGS[method](bits=bits, group_size=32, sym=False, **fields), tokens["calib"][:16].long()
        )
        kl[bits] = compare(dequantized(work), model, tokens["test"][:12].long()).kl
    assert kl["auto:3.5"] < 0.95 * (kl[3] + kl[4]) / 2, kl
