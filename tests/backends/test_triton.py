"""The Triton backend: its kernels under the interpreter here, compiled where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tests.backends.kernel_oracle import assert_close, random_weight, tokens
from woq.backends import triton as backend
from woq.backends.base import Target
from woq.weights import WeightSpec

CUDA = Target(torch.device("cuda"), torch.bfloat16)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton runs on Linux")
def test_kernels_under_the_interpreter() -> None:
    """In a process of its own: the interpreter is chosen when triton is first imported."""
    here = Path(__file__)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(here.with_name("interpreted_triton.py"))],
        cwd=here.parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("bits", range(2, 9))
def test_planes_hold_the_codes(bits: int) -> None:
    weight = random_weight(WeightSpec(100, 24, bits, 20, False), seed=bits)
    torch.testing.assert_close(
        backend.dequantize(backend.arrange(weight), torch.float32), weight.dequantize()
    )


@pytest.mark.parametrize("irregular", [False, True])
def test_planes_keep_the_activation_order(irregular: bool) -> None:
    weight = random_weight(WeightSpec(96, 8, 4, 32, False, desc_act=True), irregular_order=irregular)
    torch.testing.assert_close(
        backend.dequantize(backend.arrange(weight), torch.float32), weight.dequantize()
    )


def test_every_table_ends_without_a_bound() -> None:
    for table in backend.TUNED.values():
        bounds = [bound for bound, _ in table]
        assert bounds[-1] is None
        assert bounds[:-1] == sorted(b for b in bounds if b is not None)


@pytest.mark.parametrize(
    ("spec", "target", "part"),
    [
        (WeightSpec(64, 64, 4, 32, True), Target(torch.device("cpu"), torch.float32), "no compiler"),
        (WeightSpec(64, 64, 4, 32, True), Target(torch.device("cuda"), torch.float64), "float64"),
        (WeightSpec(64, 64, 1, 32, True), CUDA, "1"),
    ],
)
def test_why_not_gives_the_reason(spec: WeightSpec, target: Target, part: str) -> None:
    reason = backend.TritonBackend().why_not(spec, target)
    assert reason is not None
    assert part in reason


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("m", [1, 16, 17, 128])
def test_compiled_kernels_match_the_reference(dtype: torch.dtype, bits: int, m: int) -> None:
    weight = random_weight(WeightSpec(1000, 200, bits, 128, False), device="cuda")
    x = tokens(m, 1000, dtype, device="cuda")
    state = backend.arrange(weight)
    y = backend.TritonBackend().apply(x, state)
    assert_close(y, x, weight, rounded_weights=True)
    assert torch.equal(y, backend.TritonBackend().apply(x, state))
