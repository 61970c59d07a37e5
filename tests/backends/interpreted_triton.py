"""The Triton kernels under Triton's interpreter, on the CPU; test_triton.py runs this file with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from tests.backends.kernel_oracle import assert_close, random_weight, tokens
from woq.backends import triton_ops
from woq.backends.triton import TritonBackend
from woq.backends.triton_layout import arrange, block_of
from woq.backends.triton_plans import Plan
from woq.weights import WeightSpec

DECODE = Plan("decode", 8, 16, 2, 1, 1, False)
WIDE = Plan("decode", 16, 32, 1, 1, 1, False)
PREFILL = Plan("prefill", 16, 32, 1, 1, 1, False)
SPLIT = Plan("prefill", 16, 16, 3, 1, 1, False)
DENSE = Plan("dense", 0, 16, 1, 1, 1, False)
PLANS = {"decode": DECODE, "wide": WIDE, "prefill": PREFILL, "split": SPLIT, "dense": DENSE}


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("name", PLANS)
def test_every_width_and_kernel_matches_the_reference(bits: int, name: str) -> None:
    plan, sym = PLANS[name], name in ("wide", "split")
    weight = random_weight(WeightSpec(2 * block_of(bits), 16, bits, 64, sym), seed=bits)
    x = tokens(3, weight.spec.in_features, torch.float16)
    assert_close(triton_ops.run(x, arrange(weight), plan), x, weight, rounded_weights=name == "dense")


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("group_size", "m"), [(32, 1), (128, 17), (256, 2), (300, 3)])
def test_ragged_sizes_and_groups(group_size: int, m: int, name: str) -> None:
    weight = random_weight(WeightSpec(300, 23, 4, group_size, False))
    x = tokens(m, 300, torch.float16)
    assert_close(triton_ops.run(x, arrange(weight), PLANS[name]), x, weight, rounded_weights=name == "dense")


@pytest.mark.parametrize(
    ("group_size", "dtype"), [(7, torch.float16), (48, torch.float32), (64, torch.float32)]
)
def test_groups_of_any_size_and_float32_are_dequantized(group_size: int, dtype: torch.dtype) -> None:
    weight = random_weight(WeightSpec(100, 23, 4, group_size, False))
    x = tokens(2, 100, dtype)
    y = TritonBackend().apply(x, arrange(weight))
    assert_close(y, x, weight, rounded_weights=dtype == torch.float16)


@pytest.mark.parametrize("irregular", [False, True])
def test_activation_order(irregular: bool) -> None:
    weight = random_weight(WeightSpec(128, 16, 4, 32, False, desc_act=True), irregular_order=irregular)
    x = tokens(5, 128, torch.float16)
    y = TritonBackend().apply(x, arrange(weight))
    assert_close(y, x, weight, rounded_weights=irregular)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_operator_takes_any_leading_shape_and_has_a_gradient(dtype: torch.dtype) -> None:
    weight = random_weight(WeightSpec(128, 16, 4, 32, True, desc_act=True))
    x = tokens(2, 128, dtype).requires_grad_()
    y = TritonBackend().apply(x.view(1, 2, 128), arrange(weight))
    assert y.shape == (1, 2, 16)
    assert_close(y[0].detach(), x.detach(), weight, rounded_weights=dtype == torch.float32)
    y.sum().backward()
    assert x.grad is not None
    expected = weight.dequantize().sum(0).expand(2, -1)
    torch.testing.assert_close(
        x.grad.float(), expected, atol=1e-2 if dtype == torch.float16 else 1e-5, rtol=1e-2
    )


def test_no_tokens_give_no_rows() -> None:
    weight = random_weight(WeightSpec(128, 16, 4, 32, True))
    assert TritonBackend().apply(tokens(0, 128, torch.float16), arrange(weight)).shape == (0, 16)
