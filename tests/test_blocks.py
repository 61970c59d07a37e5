"""Blocks and their linears are found in every architecture, without a word about any of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.tiny_models import TINY_ARCHITECTURES
from woq.blocks import find_blocks, linears, release, weight_of, write_back
from woq.errors import QuantizationError

PATHS = {"gpt2": "transformer.h", "opt": "model.decoder.layers"}

TinyModel = Callable[[str], nn.Module]


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_blocks_are_found(arch: str, tiny_model: TinyModel) -> None:
    model = tiny_model(arch)
    path, blocks = find_blocks(model)
    assert path == PATHS.get(arch, "model.layers")
    assert blocks is model.get_submodule(path)
    assert len(blocks) == model.config.num_hidden_layers


def test_blocks_may_be_named(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    assert find_blocks(model, "model.layers")[1] is model.get_submodule("model.layers")
    with pytest.raises(QuantizationError, match=r"blocks='model\.h'.*\n.*model\.layers"):
        find_blocks(model, "model.h")
    with pytest.raises(QuantizationError, match="Linear has no ModuleList"):
        find_blocks(nn.Linear(2, 2))


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_every_matrix_of_a_block_is_a_linear_or_a_router(arch: str, tiny_model: TinyModel) -> None:
    _, blocks = find_blocks(tiny_model(arch))
    for block in blocks:
        found = linears(block)
        matrices = sum(p.numel() for p in block.parameters() if p.dim() >= 2)
        covered = sum(linear.weight.numel() for linear in found.values())
        routers = sum(
            p.numel()
            for name, p in block.named_parameters()
            if name.endswith(("gate.weight", "router.weight"))
        )
        assert covered + routers == matrices
        for linear in found.values():
            assert weight_of(linear).shape[1] % 32 == 0  # [out_features, in_features]


def test_weights_go_out_and_in_as_rows_of_outputs() -> None:
    conv, linear = Conv1D(5, 3), nn.Linear(3, 5)
    weight = torch.arange(15.0).view(5, 3)
    for module in (conv, linear):
        write_back(module, weight)
        assert torch.equal(weight_of(module), weight)
        x = torch.randn(2, 3)
        assert torch.allclose(module(x), x @ weight.t() + module.bias, atol=1e-5)


def test_release_frees(tiny_model: TinyModel) -> None:
    _, blocks = find_blocks(tiny_model("mixtral"))
    release(blocks[0])
    assert all(p.is_meta for p in blocks[0].parameters())
    assert not any(p.is_meta for p in blocks[1].parameters())
