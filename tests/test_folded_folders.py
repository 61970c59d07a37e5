"""Folders whose norms, biases and routers were rescaled: reloaded they compute the same, resumed they are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_models import TINY_ARCHITECTURES, VOCABULARY
from woq import AutoModelForCausalLM, quantize, quantize_folder
from woq.algorithms import ALGORITHMS
from woq.configs import CONFIGS, QuantConfig
from woq.configs.base import FoldingConfig
from woq.progress import Progress

QUIET = Progress()
FOLDING = [name for name in ALGORITHMS if issubclass(CONFIGS[name], FoldingConfig)]


def config_of(method: str) -> QuantConfig:
    return CONFIGS[method](
        bits=8, sym=False, group_size=32, num_samples=4, seq_len=24, **EXTRA.get(method, {})
    )


EXTRA: dict[str, dict[str, Any]] = {"teq": {"iters": 4}}


def ids(seed: int = 3) -> Tensor:
    return torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(seed))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(ids(9)).logits
    return result


@pytest.mark.parametrize("method", FOLDING)
@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_reloaded_is_what_was_quantized(arch: str, method: str, tmp_path: Path) -> None:
    source = TINY_ARCHITECTURES[arch]()
    source.save_pretrained(tmp_path / "float")  # type: ignore[operator]
    quantize_folder(tmp_path / "float", tmp_path / "q", config_of(method), [ids()], progress=QUIET)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "q", device_map="cpu", dtype="float32")
    expected = logits(source)
    report = quantize(source, config_of(method), [ids()])
    assert torch.equal(logits(reloaded), logits(source))
    assert float((logits(reloaded) - expected).norm()) < 0.2 * float(expected.norm())
    floats = {n for n, t in source.state_dict().items() if "norm" in n or ".ln_" in n}
    before = TINY_ARCHITECTURES[arch]().state_dict()
    after = reloaded.state_dict()
    folded = {n for n in floats if not torch.equal(after[n], before[n])}
    assert folded, report.notes


@pytest.mark.parametrize("method", FOLDING)
@pytest.mark.parametrize("arch", ["opt", "gemma3"])
def test_stored_in_half_precision_and_resumed(arch: str, method: str, tmp_path: Path) -> None:
    """Computed in float32, stored in float16: what the second block sees is what a resumed run reads."""
    TINY_ARCHITECTURES[arch]().half().save_pretrained(tmp_path / "float")  # type: ignore[operator]

    class Stop(Exception):
        pass

    class Stopping(Progress):
        def step(self, detail: str = "") -> None:
            if detail.endswith("layers.0"):
                raise Stop

    for name, progress in (("whole", QUIET), ("resumed", Stopping()), ("resumed", QUIET)):
        arguments = (tmp_path / "float", tmp_path / name, config_of(method), [ids()])
        if isinstance(progress, Stopping):
            with pytest.raises(Stop):
                quantize_folder(*arguments, dtype="float32", progress=progress)
        else:
            quantize_folder(*arguments, dtype="float32", resume=name == "resumed", progress=progress)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "resumed" / file.name).read_bytes()
