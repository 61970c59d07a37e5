"""The Triton kernels under Triton's interpreter, on the CPU; test_triton.py runs this file with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from tests.backends.kernel_oracle import assert_close, random_weight, tokens
from woq.backends import triton as backend
from woq.backends.triton import Tiling
from woq.weights import WeightSpec

SMALL = Tiling(16, 16, 32, 1, 1, 1)
SPLIT = Tiling(16, 16, 32, 3, 1, 1)
LARGE = Tiling(32, 32, 64, 1, 1, 1)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("tiling", "sym"), [(SMALL, True), (SPLIT, False), (LARGE, False)], ids=["small", "split", "large"]
)
def test_every_width_and_tiling_matches_the_reference(bits: int, sym: bool, tiling: Tiling) -> None:
    weight = random_weight(WeightSpec(192, 24, bits, 64, sym), seed=bits)
    x = tokens(3, 192, torch.float32)
    assert_close(backend.run(x, backend.arrange(weight), tiling), x, weight, rounded_weights=False)


@pytest.mark.parametrize("group_size", [32, 48, 100, 7])
@pytest.mark.parametrize("m", [1, 17])
def test_ragged_sizes_and_groups(group_size: int, m: int) -> None:
    weight = random_weight(WeightSpec(100, 23, 4, group_size, False))
    x = tokens(m, 100, torch.float16)
    assert_close(backend.run(x, backend.arrange(weight), SPLIT), x, weight, rounded_weights=True)


@pytest.mark.parametrize("irregular", [False, True])
def test_activation_order(irregular: bool) -> None:
    spec = WeightSpec(128, 16, 4, 32, False, desc_act=True)
    weight = random_weight(spec, irregular_order=irregular)
    x = tokens(5, 128, torch.float16)
    assert_close(backend.run(x, backend.arrange(weight), SMALL), x, weight, rounded_weights=True)


def test_the_operator_takes_its_tiling_from_the_table_and_has_a_gradient() -> None:
    weight = random_weight(WeightSpec(128, 16, 4, 32, True, desc_act=True))
    state = backend.arrange(weight)
    x = tokens(2, 128, torch.float32).requires_grad_()
    y = backend.TritonBackend().apply(x.view(1, 2, 128), state)
    assert y.shape == (1, 2, 16)
    assert_close(y[0].detach(), x.detach(), weight, rounded_weights=False)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(2, -1))
