"""The column loop, coordinate descent and best scales against naive versions in float64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.algorithms.test_gptq import correlated
from woq.algorithms import kernels
from woq.algorithms.hessian import inverse_factor
from woq.algorithms.products import product
from woq.algorithms.rounding import Grids, best_scales, descend, group_spans, round_columns
from woq.quant import dequantize, group_params, quantize, smallest_scale
from woq.weights import WeightSpec

N, K, GROUP, BITS = 8, 48, 16, 3


def problem(bits: int = BITS) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """weight [N, K], second moment, and what round-to-nearest makes of it: codes, scale, zero, each [N, K]."""
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    x = correlated(300, K)
    hessian = x.t() @ x / len(x)
    scale, zero = group_params(weight.view(N, -1, GROUP), bits, False, torch.float16)
    scale, zero = (t.repeat_interleave(GROUP, 1) for t in (scale, zero))
    return weight, hessian, quantize(weight, scale, zero, bits), scale, zero


def error(weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, hessian: Tensor) -> float:
    d = (dequantize(codes, scale, zero) - weight).double()
    return float(((d @ hessian.double()) * d).sum())


@pytest.mark.parametrize("span", [7, 128])
def test_descent_is_one_naive_sweep(span: int) -> None:
    weight, hessian, codes, scale, zero = problem()
    naive = codes.double().clone()
    for k in range(K):  # every code of the feature is tried, all other features as they stand
        trials = []
        for code in range(1 << BITS):
            trial = naive.clone()
            trial[:, k] = code
            d = (trial - zero) * scale - weight.double()
            trials.append(((d @ hessian.double()) * d).sum(1))
        naive[:, k] = torch.stack(trials).argmin(0).double()
    swept = descend(weight, codes, scale, zero, hessian, BITS, span)
    assert (swept == naive).float().mean() > 0.99  # float32 against float64 at the border of two codes
    assert error(weight, swept, scale, zero, hessian) < error(weight, codes, scale, zero, hessian)


def test_best_scales_solve_every_rows_normal_equations() -> None:
    weight, hessian, codes, scale, zero = problem()
    group_of = torch.arange(K) // GROUP
    levels = codes - zero
    found = best_scales(weight @ hessian, levels, scale[:, ::GROUP], group_of, hessian, torch.float32)
    root = torch.linalg.cholesky(hessian.double()).t()  # H = root' root: outputs in K-dimensional coordinates
    for n in range(N):
        columns = torch.stack(
            [root[:, group_of == g] @ levels[n, group_of == g].double() for g in range(K // GROUP)], 1
        )
        exact = torch.linalg.lstsq(columns, (root @ weight[n].double()).unsqueeze(1)).solution[:, 0]
        torch.testing.assert_close(found[n].double(), exact, rtol=0.02, atol=1e-3)
    better = found.repeat_interleave(GROUP, 1)
    assert error(weight, codes, better, zero, hessian) < error(weight, codes, scale, zero, hessian)


def test_best_scales_keep_what_no_data_speaks_for() -> None:
    weight, hessian, codes, scale, zero = problem()
    hessian[:GROUP] = 0
    hessian[:, :GROUP] = 0
    kept = best_scales(
        weight @ hessian, codes - zero, scale[:, ::GROUP], torch.arange(K) // GROUP, hessian, torch.float16
    )
    assert torch.equal(kept[:, 0], scale[:, 0])
    assert torch.isfinite(kept).all()


def test_span_length_changes_no_code() -> None:
    weight, hessian, _, scale, zero = problem()
    factor = inverse_factor(hessian, 0.01)
    assert factor is not None

    def grid(start: int, end: int, _rows: Tensor) -> tuple[Tensor, Tensor]:
        return scale.t()[start:end], zero.t()[start:end]

    short, long = (round_columns(weight, factor, BITS, group_spans(K, GROUP, size), grid) for size in (3, 16))
    assert (short == long).float().mean() > 0.99


@pytest.mark.gpu
def test_on_a_gpu_kernels_and_products_are_right() -> None:
    assert kernels.check(torch.device("cuda")) is None
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(300, 300, generator=generator).cuda() for _ in range(2))
    exact = (a.double() @ b.double()).float()
    scale = float(a.norm(dim=1).max() * b.norm(dim=0).max())
    assert (product(a, b) - exact).abs().max() < 2e-5 * scale
    levels = torch.randint(-128, 128, (300, 300), generator=generator).float().cuda()
    close = (levels.double() @ b.double()).float()
    assert (product(levels, b, whole=True) - close).abs().max() < 2e-5 * float(
        levels.norm(dim=1).max() * b.norm(dim=0).max()
    )


def test_triton_kernel_rounds_as_the_loop() -> None:
    pytest.importorskip("triton")
    command = "import os; os.environ['TRITON_INTERPRET'] = '1'; from tests.algorithms import test_rounding as t; t.kernel()"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=root, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr


def kernel() -> None:
    """Both forms of the grid, rounding and descent, on sizes that fill no block. Needs TRITON_INTERPRET=1."""
    from woq.algorithms import rounding, rounding_triton

    generator = torch.Generator().manual_seed(0)
    for span, columns, grids in ((16, 40, 1), (11, 33, 11)):
        rows, start = torch.randn(2, span, columns, generator=generator)
        u = torch.randn(span, span, generator=generator).mul_(0.2).triu_(1) + torch.eye(span) * 0.7
        scale = torch.rand(grids, columns, generator=generator) * 0.3 + 0.1
        zero = torch.randint(0, 16, (grids, columns), generator=generator).float()
        hessian = u @ u.t()
        for name, given in (("round_span", (rows, u)), ("descend_span", (rows, start, hessian))):
            codes, others = torch.empty(2, span, columns)
            expected = getattr(rounding, name)(*given, scale, zero, 4, codes)
            got = getattr(rounding_triton, name)(*given, scale, zero, 4, others)
            assert torch.equal(codes, others)
            torch.testing.assert_close(expected, got)
    through_the_loops()
    searched(generator)
    assert kernels.check(torch.device("cpu")) is None


def through_the_loops() -> None:
    """Factors and moments laid out as their makers leave them, through whole loops: kernels against torch."""
    weight, hessian, codes, scale, zero = problem()
    factor = inverse_factor(hessian, 0.01)
    assert factor is not None
    results = []
    for fused in (False, True):
        kernels.kernels_on = lambda _device, fused=fused: fused  # type: ignore[misc]
        for u in (factor, factor.t().contiguous().t()):  # by rows, by columns
            grids = Grids.empty(N, K // GROUP, torch.arange(K) // GROUP)
            spec = WeightSpec(K, N, BITS, GROUP, False)
            grid = grids.choosing(spec, "mse", torch.ones(K))
            rounded = round_columns(weight, u, BITS, group_spans(K, GROUP, 128), grid).t()
            by_columns = hessian.t().contiguous().t()
            results.append((rounded, descend(weight, codes, scale, zero, by_columns, BITS, 32)))
    for rounded, swept in results[1:]:
        assert (rounded == results[0][0]).float().mean() > 0.97
        assert (swept == results[0][1]).float().mean() > 0.97


def searched(generator: torch.Generator) -> None:
    """The search's kernel: groups that fill no block, one of zeros, one-sided ones, every dtype of scales."""
    from woq.algorithms import search_triton

    rows = torch.randn(24, 40, generator=generator)
    rows[:, 3], rows[:, 4], rows[:, 5] = 0, rows[:, 4].abs(), -rows[:, 5].abs()
    costs = torch.rand(24, generator=generator) + 0.1
    for bits, sym, dtype, weight in (
        (4, True, torch.float16, costs), (3, False, torch.float16, costs), (2, True, torch.float32, None),
        (8, False, torch.bfloat16, costs),
    ):  # fmt: skip
        expected = group_params(rows.t(), bits, sym, dtype, "mse", weight)
        factors = kernels._factors_on(bits, sym, "mse", rows.device)
        given = torch.ones(24) if weight is None else weight
        got = search_triton.best_params(rows, given, factors, bits, sym, dtype, smallest_scale(dtype))
        errors = [
            ((dequantize(quantize(rows, s, z, bits), s, z) - rows).square() * given[:, None]).sum(0)
            for s, z in (expected, got)
        ]
        torch.testing.assert_close(*errors, rtol=1e-4, atol=1e-9)
        assert (expected[0] == got[0]).float().mean() > 0.9
        assert (expected[1] == got[1]).float().mean() > 0.9
