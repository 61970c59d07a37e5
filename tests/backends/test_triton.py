"""The Triton backend: its kernels under the interpreter here, compiled where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import library

pytest.importorskip("triton")

from tests.backends.kernel_oracle import assert_close, random_weight, tokens
from woq.backends import triton as backend
from woq.backends import triton_ops
from woq.backends.base import Target
from woq.backends.triton import TritonBackend
from woq.backends.triton_layout import arrange, block_of, fits_kernels, pack_words, unpack_words
from woq.backends.triton_plans import ANY, DENSE, LIKE, PLANS, Plan, fitted, plan_for, shared_bytes
from woq.weights import WeightSpec

CUDA = Target(torch.device("cuda"), torch.bfloat16)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton runs on Linux")
def test_kernels_under_the_interpreter() -> None:
    """In a process of its own: the interpreter is chosen when triton is first imported."""
    here = Path(__file__)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    # Not a part of the run it is started from, whose workers tell their plugins so by such variables.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, str(here.with_name("interpreted_triton.py"))],
        cwd=here.parents[2],
        env={**outside, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("bits", range(2, 9))
def test_words_hold_the_codes(bits: int) -> None:
    codes = random_weight(WeightSpec(100, 24, bits, 20, False), seed=bits).codes
    words = pack_words(codes, bits)
    block = block_of(bits)
    assert words.shape == (2, -(-100 // block), bits * block // 512, 16, 32)
    torch.testing.assert_close(unpack_words(words, bits)[:24, :100], codes.to(torch.int16))


def test_the_layout_is_as_documented() -> None:
    """The place of one code, by the rule in triton_layout.py: n 17, k 128 + 70 is run 2 of block 1, word 6 of row 1."""
    codes = torch.zeros(32, 256, dtype=torch.uint8)
    codes[17, 128 + 70] = 13
    words = pack_words(codes, 4)
    assert words[1, 1, 0, 1, 6].item() == 13 << 8
    assert words.count_nonzero() == 1


@pytest.mark.parametrize("irregular", [False, True])
def test_act_order_sorts_columns_by_group(irregular: bool) -> None:
    weight = random_weight(WeightSpec(96, 8, 4, 32, False, desc_act=True), irregular_order=irregular)
    state = arrange(weight)
    assert state.order is not None and state.zeros is not None
    group = torch.arange(96) // state.group_size
    codes = unpack_words(state.words, 4)[:8, :96].float()
    dense = (codes - state.zeros[group].t()) * state.scales[group].t().float()
    torch.testing.assert_close(dense, weight.dequantize()[:, state.order.long()])


@pytest.mark.parametrize(
    ("bits", "group_size", "fits"),
    [(4, 128, True), (4, 32, True), (4, 64, True), (4, 384, True), (4, 48, False), (4, 96, False), (4, 1, False),
     (3, 128, True), (3, 384, False), (2, 256, True), (8, 16, False)],
)  # fmt: skip
def test_groups_that_the_kernels_scale_by(bits: int, group_size: int, fits: bool) -> None:
    assert fits_kernels(bits, group_size) is fits


@pytest.mark.parametrize("device", PLANS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_product_has_a_plan_that_the_kernels_take(device: str, bits: int) -> None:
    for tokens_ in (1, 2, 9, 100, 5000, 10**6):
        for n, k in ((16, 16), (4096, 4096), (28672, 4096), (4096, 14336), (151936, 896)):
            plan = plan_for(device, bits, tokens_, n, k)
            assert isinstance(plan, Plan)
            assert plan.block_n % 16 == 0
            assert plan.kernel == "dense" or plan.block_m in (8, 16, 32, 64, 128)
    rows = PLANS[device]
    assert any(row.bits == LIKE.get(bits, bits) and row.tokens == ANY for row in rows)


def test_plans_are_those_of_the_nearest_shape() -> None:
    rows = [row for row in PLANS[""] if row.bits == 4]
    assert plan_for("Intel(R) Data Center GPU Max 1100", 4, 1, 4096, 4096) == rows[0].plan
    assert plan_for("", 4, rows[0].tokens + 1, 4096, 4096) == rows[1].plan


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_plans_of_an_unknown_device_fit_into_64_kib(bits: int) -> None:
    for row in [*PLANS[""], *PLANS["NVIDIA"]]:
        plan = fitted(row.plan, bits, 65536)
        assert shared_bytes(plan, bits) <= 65536
        assert plan in (row.plan, DENSE) or bits != 4


def test_a_plan_gives_up_stages_before_it_gives_up() -> None:
    plan = Plan("decode", 16, 64, 4, 4, 5, False)
    needed = [shared_bytes(plan._replace(stages=stages), 4) for stages in (1, 2, 3, 4, 5)]
    assert needed == sorted(needed)
    assert fitted(plan, 4, needed[4]) == plan
    assert fitted(plan, 4, needed[3]).stages == 4
    assert fitted(plan, 4, needed[0] - 1) == DENSE


@pytest.mark.parametrize(
    ("spec", "target", "part"),
    [
        (WeightSpec(64, 64, 4, 32, True), Target(torch.device("cpu"), torch.float32), "no compiler"),
        (WeightSpec(64, 64, 4, 32, True), Target(torch.device("cuda"), torch.float64), "float64"),
        (WeightSpec(64, 64, 1, 32, True), CUDA, "1"),
    ],
)
def test_why_not_gives_the_reason(spec: WeightSpec, target: Target, part: str) -> None:
    reason = TritonBackend().why_not(spec, target)
    assert reason is not None
    assert part in reason


def test_why_not_says_what_triton_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.shutil, "which", lambda name: None)
    assert "C compiler" in str(backend.missing.__wrapped__())
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in str(backend.missing.__wrapped__())


DTYPES = [torch.bfloat16, torch.float16]
GPU_PLANS = {
    "decode": Plan("decode", 8, 16, 4, 4, 3, False),
    "decode, two tiles": Plan("decode", 16, 32, 2, 4, 2, False),
    "prefill": Plan("prefill", 64, 64, 1, 4, 3, False),
    "prefill, split": Plan("prefill", 32, 128, 4, 8, 3, False),
    "dense": Plan("dense", 0, 64, 1, 4, 1, False),
}


def check(spec: WeightSpec, m: int, dtype: torch.dtype, plan: Plan | None = None) -> None:
    """The product against float64; the result's memory is poisoned first; a second run gives the same bits."""
    weight = random_weight(spec, device="cuda", irregular_order=False)
    x = tokens(m, spec.in_features, dtype, device="cuda")
    state = arrange(weight)

    def product() -> torch.Tensor:
        torch.full(
            (m, spec.out_features), torch.nan, dtype=dtype, device="cuda"
        )  # freed: the result comes here
        if plan is None:
            return TritonBackend().apply(x, state)
        return triton_ops.run(x, state, fitted(plan, spec.bits, triton_ops.abilities(x.device).shared))

    y = product()
    assert_close(y, x, weight, rounded_weights=plan is None or plan.kernel == "dense")
    assert torch.equal(y, product())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("name", GPU_PLANS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_kernel_on_the_device(bits: int, name: str, sym: bool, dtype: torch.dtype) -> None:
    check(WeightSpec(2048, 128, bits, 128, sym), 17, dtype, GPU_PLANS[name])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, 64, 128, 1000, 7])
@pytest.mark.parametrize("m", [1, 16, 33, 300])
def test_ragged_shapes_on_the_device(m: int, group_size: int, dtype: torch.dtype) -> None:
    check(WeightSpec(1000, 200, 4, group_size, False), m, dtype)


MEASURED_PLANS = sorted({(row.bits, row.plan) for rows in PLANS.values() for row in rows}, key=str)


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "plan"), MEASURED_PLANS)
def test_every_plan_on_the_device(bits: int, plan: Plan) -> None:
    check(WeightSpec(4096, 256, bits, 128, True), max(plan.block_m, 1), torch.bfloat16, plan)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [8, 200])
def test_early_start_reads_nothing_past_the_weight(n: int) -> None:
    check(WeightSpec(1000, n, 4, 128, False), 3, torch.float16, Plan("decode", 8, 64, 4, 4, 2, True))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 64, 300])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_planned_products_on_the_device(m: int, bits: int) -> None:
    check(WeightSpec(4096, 4096, bits, 128, True), m, torch.bfloat16)
    check(WeightSpec(4096, 4096, bits, 4096, False, desc_act=True), m, torch.float16)


@pytest.mark.gpu
def test_float32_on_the_device() -> None:
    check(WeightSpec(512, 200, 4, 128, False), 5, torch.float32)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_the_operator_is_one_to_torch() -> None:
    weight = random_weight(WeightSpec(512, 64, 4, 128, False, desc_act=True), device="cuda")
    state = arrange(weight)
    x = tokens(4, 512, torch.bfloat16, device="cuda").requires_grad_()
    arguments = (x, state.words, state.scales, state.zeros, state.order, state.bits, state.group_size)
    library.opcheck(torch.ops.woq.triton_linear.default, arguments)
    compiled = torch.compile(lambda x: TritonBackend().apply(x, state) * 2, fullgraph=True)
    assert torch.equal(compiled(x), TritonBackend().apply(x, state) * 2)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 40])
def test_a_chain_in_a_cuda_graph_repeats_to_the_bit(m: int) -> None:
    """Kernels start before their predecessors have ended: each must still read what those wrote."""
    spec = WeightSpec(2048, 2048, 4, 128, False, desc_act=True)
    layers = [arrange(random_weight(spec, device="cuda", seed=seed)) for seed in range(6)]
    apply = TritonBackend().apply

    def chain(x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x = apply(x, layer)
        return x

    x = tokens(m, 2048, torch.bfloat16, device="cuda")
    step = x
    for layer in layers:
        step = apply(step, layer)
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(x)
    for _ in range(20):
        y.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, step)


@pytest.mark.gpu
def test_the_current_device_does_not_matter() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    weight = random_weight(WeightSpec(512, 64, 4, 128, False, desc_act=True), device="cuda:1")
    x = tokens(3, 512, torch.bfloat16, device="cuda:1")
    with torch.cuda.device(0):
        y = TritonBackend().apply(x, arrange(weight))
    assert_close(y, x, weight, rounded_weights=False)
