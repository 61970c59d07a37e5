"""Torch's XPU kernels get the tensors that their layouts ask for, to the value; stand-ins check and decode them.

Nothing here runs on an XPU unless one is there: `woq doctor --selftest` is for its owner.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, library

from tests.backends.test_cpu_torch import inputs, random_weight
from tests.backends.xpu_standin import XpuKernels, decode_int4
from woq.backends import choose, load, why_not
from woq.backends.base import Target
from woq.backends.xpu import XpuBackend, arrange, has_kernel, kernel_group
from woq.errors import BackendError
from woq.weights import GPTQ_V1, GPTQ_V2, Layout, QuantizedWeight, WeightSpec

XPU = torch.device("xpu")
CPU = torch.device("cpu")
HALVES = (torch.bfloat16, torch.float16)
PLAIN = Layout("inc_plain", 0, torch.int64, 0)
INT4 = "aten::_weight_int4pack_mm_with_scales_and_zeros"
INT8 = "aten::_weight_int8pack_mm"
# (N, K, group size): the kernel's own groups, several of them in one, per channel; N odd and one.
SHAPES = [
    (16, 64, 32),
    (33, 256, 128),
    (7, 512, 256),
    (20, 96, 96),
    (5, 1024, 512),
    (1, 320, 320),
    (48, 192, 64),
]


@pytest.fixture
def kernels() -> Iterator[XpuKernels]:
    with XpuKernels() as mode:
        yield mode


@pytest.fixture
def _kernels_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("woq.backends.xpu.has_kernel", lambda operator: True)


def tolerance(dtype: torch.dtype, exact: Tensor) -> float:
    """Half an ulp of the result; the stand-ins sum in float64."""
    return float(torch.finfo(dtype).eps * exact.abs().max()) + 1e-6


@pytest.mark.usefixtures("_kernels_there")
@pytest.mark.parametrize("desc_act", [False, True], ids=["in order", "desc_act"])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int4(shape: tuple[int, int, int], sym: bool, desc_act: bool, kernels: XpuKernels) -> None:
    n, k, group_size = shape
    desc_act = desc_act and group_size < k
    for layout, scale_dtype, dtype in itertools.product((GPTQ_V1, GPTQ_V2, PLAIN), HALVES, HALVES):
        spec = WeightSpec(k, n, 4, group_size, sym, desc_act, scale_dtype, layout)
        if XpuBackend().why_not(spec, Target(XPU, dtype)) is not None:
            assert (scale_dtype, dtype) == (torch.bfloat16, torch.float16)
            continue
        weight = random_weight(spec)
        packed = weight.pack()
        before = {name: t.clone() for name, t in packed.tensors().items()}
        state = XpuBackend().prepare(packed, Target(CPU, dtype))
        assert all(torch.equal(t, before[name]) for name, t in packed.tensors().items())
        x = torch.randn(3, k).to(dtype)
        got = XpuBackend().apply(x, state)
        given_x, given_weight, group, scales, zeros = kernels.calls[-1]
        # what the kernel sees is the weight with its columns in some order, and the activations in that order
        rounded = QuantizedWeight(spec, weight.codes, weight.scales.to(dtype), weight.zeros, weight.g_idx)
        exact = rounded.dequantize(torch.float64)
        order = torch.arange(k)
        if desc_act:
            order = torch.tensor(sorted(range(k), key=weight.groups_of_inputs().tolist().__getitem__))
        assert torch.equal(decode_int4(given_weight, group, scales, zeros), exact[:, order])
        assert torch.equal(given_x, x[:, order])
        want = x.double() @ exact.t()
        assert (got.double() - want).abs().max() <= tolerance(dtype, want)
        assert got.dtype == dtype


@pytest.mark.usefixtures("_kernels_there")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(16, 64), (7, 50), (1, 33)])
def test_int8(n: int, k: int, dtype: torch.dtype, kernels: XpuKernels) -> None:
    for scale_dtype in (torch.float16, torch.bfloat16, torch.float32):
        weight = random_weight(WeightSpec(k, n, 8, k, True, scale_dtype=scale_dtype))
        assert XpuBackend().why_not(weight.spec, Target(XPU, dtype)) is None
        x = torch.randn(3, k).to(dtype)
        got = XpuBackend().apply(x, XpuBackend().prepare(weight.pack(), Target(CPU, dtype)))
        _, codes, scales = kernels.calls[-1]
        assert torch.equal(codes, weight.codes.to(torch.int16).sub(128).to(torch.int8))
        assert torch.equal(scales, weight.scales.float()[:, 0])
        want = x.double() @ weight.dequantize(torch.float64).t()
        assert (got.double() - want).abs().max() <= tolerance(dtype, want)


@pytest.mark.parametrize("bits", [4, 8])
def test_every_form_of_input(bits: int, kernels: XpuKernels) -> None:
    k = 64
    weight = random_weight(WeightSpec(k, 20, bits, 32 if bits == 4 else k, True, desc_act=bits == 4))
    state = arrange(weight, torch.bfloat16)
    for x in inputs(k):
        given = x.clone()
        got = XpuBackend().apply(x, state)
        assert torch.equal(x, given)
        want = x.double() @ weight.dequantize(torch.float64).t()
        assert got.shape == want.shape and got.dtype == torch.bfloat16
        if want.numel():
            assert (got.double() - want).abs().max() <= 2 * tolerance(torch.bfloat16, want)


def test_every_code_and_zero_point(kernels: XpuKernels) -> None:
    pairs = list(itertools.product(range(16), range(16)))
    codes = torch.tensor([q for q, _ in pairs], dtype=torch.uint8).unsqueeze(1).expand(256, 32).contiguous()
    zeros = torch.tensor([z for _, z in pairs], dtype=torch.uint8).unsqueeze(1)
    weight = QuantizedWeight(WeightSpec(32, 256, 4, 32, False), codes, torch.ones(256, 1).half(), zeros)
    for column in range(32):
        x = torch.zeros(1, 32, dtype=torch.bfloat16)
        x[0, column] = 1
        got = XpuBackend().apply(x, arrange(weight, torch.bfloat16))
        assert got.flatten().tolist() == [q - z for q, z in pairs]


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 128), (8, 128)])
def test_torchs_own_shape_functions_agree(bits: int, group_size: int) -> None:
    """On the meta device the operators' checks are PyTorch's, not ours."""
    target = Target(torch.device("meta"), torch.bfloat16)
    state = XpuBackend().prepare(random_weight(WeightSpec(128, 24, bits, group_size, True)).pack(), target)
    y = XpuBackend().apply(torch.empty(2, 3, 128, dtype=torch.bfloat16, device="meta"), state)
    assert y.device.type == "meta"
    assert (y.shape, y.dtype) == ((2, 3, 24), torch.bfloat16)


@pytest.mark.parametrize(
    ("given", "kernel"), [(32, 32), (64, 64), (96, 32), (256, 256), (512, 256), (320, 64), (48, 16)]
)
def test_kernel_groups(given: int, kernel: int) -> None:
    assert kernel_group(given) == kernel
    assert given % kernel == 0


SPEC = WeightSpec(64, 16, 4, 32, True)
REFUSED = [
    (WeightSpec(64, 16, 3, 32, True), torch.bfloat16, "4 and 8 bits, not 3"),
    (SPEC, torch.float32, "bfloat16 and float16, not torch.float32"),
    (WeightSpec(64, 16, 4, 16, True), torch.bfloat16, "multiple of 32.*not 16"),
    (WeightSpec(96, 16, 4, 48, True), torch.bfloat16, "multiple of 32.*not 48"),
    (WeightSpec(80, 16, 4, 32, True), torch.bfloat16, "divide in_features"),
    (
        WeightSpec(64, 16, 4, 32, True, scale_dtype=torch.bfloat16),
        torch.float16,
        "round torch.bfloat16 scales",
    ),
    (WeightSpec(64, 16, 4, 32, True, scale_dtype=torch.float32), torch.float16, "round torch.float32 scales"),
    (WeightSpec(64, 16, 8, 32, True), torch.bfloat16, "symmetric and per channel"),
    (WeightSpec(64, 16, 8, 64, False), torch.bfloat16, "symmetric and per channel"),
]


@pytest.mark.usefixtures("_kernels_there")
@pytest.mark.parametrize(("spec", "dtype", "reason"), REFUSED)
def test_reasons(spec: WeightSpec, dtype: torch.dtype, reason: str) -> None:
    told = load("xpu").why_not(spec, Target(XPU, dtype))
    assert told is not None
    assert re.search(reason, told)


def test_the_reference_takes_over_and_the_request_is_refused() -> None:
    target = Target(XPU, torch.float32)
    assert choose(SPEC, target).name in ("triton", "reference")
    with pytest.raises(BackendError, match=r"no backend for .* on xpu: xpu: .*not torch.float32"):
        choose(SPEC, target, "xpu")
    assert why_not("xpu", SPEC, Target(CPU, torch.bfloat16)) == "runs on xpu, not on cpu"


@pytest.mark.parametrize("operator", [INT4, INT8])
def test_a_torch_without_the_kernel_is_asked(operator: str) -> None:
    if torch.version.xpu is not None:
        pytest.skip("this torch has them")
    spec = SPEC if operator == INT4 else WeightSpec(64, 16, 8, 64, True)
    target = Target(XPU, torch.bfloat16)
    told = load("xpu").why_not(spec, target)
    assert told is not None and f"has no XPU kernel for {operator}" in told
    operators = library.Library("aten", "IMPL")
    try:
        operators.impl(operator.removeprefix("aten::"), lambda *arguments: None, "XPU")
        assert has_kernel(operator)
        assert load("xpu").why_not(spec, target) is None
    finally:
        operators._destroy()
    assert not has_kernel(operator)


@pytest.mark.xpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_on_an_xpu(bits: int, dtype: torch.dtype) -> None:
    from woq.selftest import run_selftest

    rows = [row for row in run_selftest([Target(XPU, dtype)]) if row.backend == "xpu" and row.bits == bits]
    assert rows and all(row.passed for row in rows)
