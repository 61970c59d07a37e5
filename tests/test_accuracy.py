"""Accuracy on a real model, so that it cannot rot: a fast subset of `benchmarks/quality.py`.

stories15M, group 32, a quarter of the protocol's calibration windows and 12 of its 403 test windows. The bounds stand
about a twentieth above what was measured when they were set; hardware alone moves such figures by a percent.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.quality import dequantized
from woq import config_from_dict, quantize
from woq.evaluation import compare

KL_BOUNDS = {
    ("rtn", 4, True): 0.117,
    ("rtn", 4, False): 0.101,
    ("rtn", 3, False): 0.455,
    ("awq", 4, False): 0.063,
    ("awq", 3, False): 0.313,
    ("gptq", 4, True): 0.0385,
    ("gptq", 3, False): 0.165,
    ("gptq", 2, True): 0.87,
}


@pytest.fixture(scope="module")
def model(stories15m: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(stories15m, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokens(shared_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(shared_dir / "data" / "quality" / "stories15M.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "bits", "sym"), KL_BOUNDS)
def test_divergence_stays_low(
    method: str, bits: int, sym: bool, model: Any, tokens: dict[str, torch.Tensor]
) -> None:
    settings = {"quant_method": method, "bits": bits, "sym": sym, "group_size": 32}
    if method != "rtn":
        settings["num_samples"] = 32
    work = copy.deepcopy(model)
    quantize(work, config_from_dict(settings), tokens["calib"][:32].long())
    kl = compare(dequantized(work), model, tokens["test"][:12].long()).kl
    assert kl < KL_BOUNDS[method, bits, sym]
