"""Algorithms that look at the block after the one at hand, and where blocks are before and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn

from tests.tiny_models import TINY_ARCHITECTURES
from woq import AutoRoundConfig, GPTQConfig, quantize
from woq.algorithms.autoround import AutoRound
from woq.algorithms.base import LayerResult
from woq.blocks import find_blocks
from woq.replay import BlockInputs
from woq.weights import WeightSpec

IDS = torch.arange(3, 99).view(4, 24)
FEW = {"bits": 4, "group_size": 16, "num_samples": 4, "seq_len": 24}


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_each_block_sees_the_next(
    arch: str, lookahead: int, tiny_model: Callable[[str], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(arch)
    _, blocks = find_blocks(model)
    seen: list[nn.Module | None] = []
    own = AutoRound.quantize_block

    def watched(
        self: AutoRound, block: nn.Module, specs: Mapping[str, WeightSpec], inputs: BlockInputs | None
    ) -> dict[str, LayerResult]:
        assert inputs is not None
        following = inputs.following
        seen.append(None if following is None else following.block)
        return own(self, block, specs, inputs)

    monkeypatch.setattr(AutoRound, "quantize_block", watched)
    config = AutoRoundConfig(**FEW, iters=2, init="rtn", lookahead=lookahead, on_ragged_group="smaller")
    quantize(model, config, IDS, device="cpu")
    assert seen == ([*blocks[1:], None] if lookahead else [None] * len(blocks))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config", [GPTQConfig(**FEW, quant_lm_head=True), AutoRoundConfig(**FEW, iters=2, lookahead=1)]
)
def test_what_a_gpu_quantizes_comes_back(
    config: GPTQConfig | AutoRoundConfig, tiny_model: Callable[[str], nn.Module]
) -> None:
    model = tiny_model("llama")
    quantize(model, config, IDS, device="cuda")
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert torch.isfinite(model(IDS).logits).all()
