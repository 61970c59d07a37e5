"""torch's CPU kernels against the reference over all they claim, and their reasons for the rest."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from woq.backends import load
from woq.backends.base import Target
from woq.weights import GPTQ_V2, Layout, QuantizedWeight, WeightSpec

CPU = Target(torch.device("cpu"), torch.bfloat16)
EPS = torch.finfo(torch.bfloat16).eps
ROWS = (1, 2, 3, 7, 16, 17)

PLAIN = Layout("inc_plain", 0, torch.int64, 0)
# (N, K, group size): groups the kernel has, groups it has not but that are several of its own, N that no tile fits.
SHAPES4 = [
    (16, 64, 32),
    (48, 256, 64),
    (33, 256, 128),
    (7, 512, 256),
    (20, 96, 96),
    (5, 1024, 512),
    (64, 320, 320),
]


def random_weight(spec: WeightSpec, seed: int = 0) -> QuantizedWeight:
    g = torch.Generator().manual_seed(seed)
    n, k = spec.out_features, spec.in_features
    codes = torch.randint(0, 1 << spec.bits, (n, k), generator=g).to(torch.uint8)
    zeros = torch.randint(0, 1 << spec.bits, (n, spec.groups), generator=g).to(torch.uint8)
    if spec.sym:
        zeros.fill_(1 << (spec.bits - 1))
    scales = (torch.randn(n, spec.groups, generator=g) * 0.05).to(spec.scale_dtype)
    g_idx = (
        torch.randperm(k, generator=g).div(spec.group_size, rounding_mode="floor") if spec.desc_act else None
    )
    return QuantizedWeight(spec, codes, scales, zeros, None if g_idx is None else g_idx.to(torch.int32))


def bound(weight: QuantizedWeight, x: Tensor) -> Tensor:
    """What bfloat16 may cost: half an ulp of every scale, of every zero term, and of the result; sums in float32.

    |error| <= eps/2 * sum_k |x_k| (|w_k| + |(8 - z) s| + |(q - 8) s|) + eps/2 * |y|, with room for the order of summing.
    """
    g = weight.groups_of_inputs()
    scales = weight.scales.float().abs()[:, g]
    middle = 1 << (weight.spec.bits - 1)
    terms = (weight.codes.float() - middle).abs() * scales
    terms += (weight.zeros.float()[:, g] - middle).abs() * scales
    result = x.float().abs() @ (terms + weight.dequantize().abs()).t()
    return EPS * result + 1e-6


def check(weight: QuantizedWeight, x: Tensor) -> None:
    backend = load("torch")
    assert backend.why_not(weight.spec, CPU) is None
    packed = weight.pack()
    before = {name: t.clone() for name, t in packed.tensors().items()}
    state = backend.prepare(packed, CPU)
    assert all(torch.equal(t, before[name]) for name, t in packed.tensors().items())
    given = x.clone()
    got = backend.apply(x, state)
    assert torch.equal(x, given)
    assert got.dtype == torch.bfloat16
    assert got.shape == (*x.shape[:-1], weight.spec.out_features)
    exact = x.double() @ weight.dequantize(torch.float64).t()
    flat = x.reshape(-1, x.shape[-1])
    assert ((got.double() - exact).abs() <= bound(weight, flat).view_as(exact)).all()


def inputs(k: int) -> Iterator[Tensor]:
    """Every number of rows, then the forms that a kernel may take for plain rows."""
    g = torch.Generator().manual_seed(1)
    wide = torch.randn(20, 2 * k + 1, generator=g).to(torch.bfloat16)
    for rows in ROWS:
        yield wide[:rows, :k].contiguous()
    yield wide[:5, :k]  # rows further apart than they are long
    yield wide[:5, 1 : k + 1]  # and not aligned
    yield wide.flatten()[1 : 1 + 4 * k].view(4, k)  # contiguous, not aligned
    yield wide[:5, : 2 * k : 2]  # every second element
    yield wide[:6, :k].reshape(2, 3, k).transpose(0, 1)  # batch and length turned
    yield wide[0, :k]  # one vector
    yield wide[:0, :k]  # no token


@pytest.mark.parametrize("desc_act", [False, True], ids=["in order", "desc_act"])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("shape", SHAPES4, ids=str)
def test_int4(shape: tuple[int, int, int], sym: bool, desc_act: bool) -> None:
    n, k, group_size = shape
    desc_act = desc_act and group_size < k
    for layout, dtype in itertools.product((GPTQ_V2, PLAIN), (torch.float16, torch.bfloat16, torch.float32)):
        weight = random_weight(WeightSpec(k, n, 4, group_size, sym, desc_act, dtype, layout))
        check(weight, torch.randn(3, k).to(torch.bfloat16))
    for x in inputs(k):
        check(weight, x)


@pytest.mark.parametrize(("n", "k"), [(16, 64), (7, 48), (33, 272)])
def test_int8(n: int, k: int) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        weight = random_weight(WeightSpec(k, n, 8, k, True, scale_dtype=dtype))
        for x in inputs(k):
            check(weight, x)


def test_every_code_and_zero_point_of_int4() -> None:
    """All 256 pairs at scale 1, one at a time: integers up to 15 are exact in bfloat16."""
    pairs = list(itertools.product(range(16), range(16)))
    codes = torch.tensor([q for q, _ in pairs], dtype=torch.uint8).unsqueeze(1).expand(256, 32).contiguous()
    zeros = torch.tensor([z for _, z in pairs], dtype=torch.uint8).unsqueeze(1)
    weight = QuantizedWeight(WeightSpec(32, 256, 4, 32, False), codes, torch.ones(256, 1).half(), zeros)
    backend = load("torch")
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    x[0, 5] = 1
    got = backend.apply(x, backend.prepare(weight.pack(), CPU))
    assert got.flatten().tolist() == [q - z for q, z in pairs]


REFUSED = [
    (WeightSpec(64, 16, 3, 32, True), torch.bfloat16, "4 and 8 bits, not 3"),
    (WeightSpec(64, 16, 4, 32, True), torch.float32, "bfloat16 only, not torch.float32"),
    (WeightSpec(64, 16, 4, 32, True), torch.float16, "bfloat16 only, not torch.float16"),
    (WeightSpec(64, 16, 4, 16, True), torch.bfloat16, "multiple of 32.*not 16"),
    (WeightSpec(80, 16, 4, 32, True), torch.bfloat16, "divide in_features"),
    (WeightSpec(64, 16, 8, 32, True), torch.bfloat16, "symmetric and per channel"),
    (WeightSpec(64, 16, 8, 64, False), torch.bfloat16, "symmetric and per channel"),
    (WeightSpec(72, 16, 8, 72, True), torch.bfloat16, "multiple of 16, and this is 72"),
]


@pytest.mark.parametrize(("spec", "dtype", "reason"), REFUSED)
def test_reasons(spec: WeightSpec, dtype: torch.dtype, reason: str) -> None:
    told = load("torch").why_not(spec, Target(torch.device("cpu"), dtype))
    assert told is not None
    assert re.search(reason, told)
