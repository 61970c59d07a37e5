"""The package's CPU kernels against float64, on every instruction set that this processor has."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library

from tests.backends.kernel_oracle import assert_close, random_weight, tokens
from woq import native
from woq.backends import load
from woq.backends.base import Target
from woq.backends.cpu import BEST, LEVELS, CpuBackend, CpuState, _register, arrange, levels, multiply
from woq.selftest import sample
from woq.weights import CODEBOOKS, Layout, QuantizedWeight, WeightSpec

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PLAIN = Layout("inc_plain", 0, torch.int64, 0)
# One token, each width of a tile and what lies between, several tiles, and more tokens than are arranged at a time.
TOKENS = (1, 2, 3, 5, 8, 12, 13, 29, 131)


@pytest.fixture(autouse=True, scope="module")
def compiled_library() -> None:
    reason = native.why_not("cpu")
    if reason is not None:
        pytest.skip(f"no CPU kernels: {reason}")
    _register()


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> int:
    """Every instruction set by its number."""
    if request.param not in levels():
        pytest.skip(f"this processor has no {request.param}")
    return LEVELS.index(request.param)


def rounds_weights(weight: QuantizedWeight, x: Tensor) -> bool:
    """bf16 dot products take a codebook's values in bf16; whole numbers up to 255 are exact in it."""
    return weight.spec.is_codebook and x.dtype == torch.bfloat16


def by_group(values: Tensor, state: CpuState) -> Tensor:
    """[rows, K] -> [rows, kernel groups, inputs of one], 0 in the padding."""
    _, groups, units, _ = state.weight.shape
    if state.order is None:
        padded = F.pad(values, (0, groups * units * 32 - values.shape[1]))
    else:
        padded = values[:, state.order.clamp(min=0).long()] * (state.order >= 0)
    return padded.view(values.shape[0], groups, units * 32)


def assert_within_int8(y: Tensor, x: Tensor, weight: QuantizedWeight, state: CpuState) -> None:
    """Each activation moves by at most half a step, a step being 1/127 of its token's largest in the kernels' group.

    A codebook's values move by at most half of 1/127 of the largest too. Then the result's own rounding, and float32's.
    """
    dense = weight.dequantize(torch.float64)
    xs, ws = by_group(x.double(), state), by_group(dense, state)
    half_steps = xs.abs().amax(-1) / 127 / 2
    bound = half_steps @ ws.abs().sum(-1).T
    scale = weight.scales.double().abs()[:, weight.groups_of_inputs()]
    if weight.spec.is_codebook:
        assert state.table is not None
        largest = float(state.table.abs().max())
        moved = by_group(scale, state) * largest / 127 / 2
        padding = by_group(torch.ones_like(scale), state)
        bound = bound + (xs.abs() + half_steps.unsqueeze(-1)).flatten(1) @ (moved * padding).flatten(1).T
    expected = x.double() @ dense.T
    rounding = torch.finfo(x.dtype).eps / 2 * (expected.abs() + bound)
    rounding += 2.0**-20 * (x.double().abs() @ scale.T) * 2.0**weight.spec.bits
    error = (y.double() - expected).abs()
    assert torch.isfinite(y).all()
    assert (error <= bound * (1 + 1e-5) + rounding + 1e-7).all(), (
        f"{(error / (bound + rounding)).max():.2f} of its bound"
    )


def check(weight: QuantizedWeight, level: int, counts: tuple[int, ...] = TOKENS) -> None:
    """Both modes, all dtypes."""
    spec, packed = weight.spec, weight.pack()
    exact, int8 = arrange(packed), arrange(packed, int8=True)
    for m, dtype in zip(counts, itertools.cycle(DTYPES), strict=False):
        x = tokens(m, spec.in_features, dtype, seed=m)
        assert_close(multiply(x, exact, level), x, weight, rounded_weights=rounds_weights(weight, x))
        assert_within_int8(multiply(x, int8, level), x, weight, int8)


# (K, N, group): tails of every kind, groups of one to five units, groups that are split, groups that are padded.
SHAPES = [
    (256, 40, 128),
    (96, 33, 32),
    (300, 1, 64),
    (320, 50, 160),
    (130, 70, 100),
    (1000, 64, 1000),
    (33, 16, 33),
]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_every_width_and_shape(level: int, bits: int, sym: bool) -> None:
    dtypes = itertools.cycle((torch.float16, torch.bfloat16, torch.float32))
    for k, n, group in SHAPES:
        check(random_weight(WeightSpec(k, n, bits, group, sym, scale_dtype=next(dtypes))), level)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_tokens(level: int, dtype: torch.dtype) -> None:
    weight = random_weight(WeightSpec(128, 48, 4, 64, False))
    exact, int8 = arrange(weight.pack()), arrange(weight.pack(), int8=True)
    for m in (*range(1, 38), 127, 128, 129, 300):
        x = tokens(m, 128, dtype, seed=m)
        assert_close(multiply(x, exact, level), x, weight, rounded_weights=False)
        assert_within_int8(multiply(x, int8, level), x, weight, int8)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_act_order(level: int, bits: int) -> None:
    for group, irregular in itertools.product((32, 48), (False, True)):
        spec = WeightSpec(192, 40, bits, group, False, desc_act=True)
        check(random_weight(spec, irregular_order=irregular), level, (1, 7, 30))


def test_many_tokens_through_torchs_product(level: int) -> None:
    """What machines with AMX do. Weights are rounded to bf16."""
    x = tokens(50, 192, torch.bfloat16)
    specs = [
        WeightSpec(192, n, b, 48, False, desc)
        for n in (7, 70)
        for b in (2, 3, 4, 8)
        for desc in (False, True)
    ]
    for spec in (*specs, WeightSpec(192, 40, 4, 64, True)):
        weight = random_weight(spec)
        y = multiply(x, arrange(weight.pack()), level, matmul_from=50)
        assert_close(y, x, weight, rounded_weights=True)
    wide = random_weight(WeightSpec(4100, 300, 4, 128, False))  # several panels, where there are few threads
    x = tokens(2, 4100, torch.bfloat16)
    assert_close(multiply(x, arrange(wide.pack()), level, matmul_from=1), x, wide, rounded_weights=True)


@pytest.mark.parametrize("data_type", [*CODEBOOKS, "int_float_zeros"])
def test_data_types(level: int, data_type: str) -> None:
    for k, group in ((256, 64), (130, 130)):
        spec = WeightSpec(k, 40, 4, group, data_type in CODEBOOKS, data_type=data_type)  # type: ignore[arg-type]
        check(sample(spec), level)


def test_layouts_of_neural_compressor(level: int) -> None:
    for layout in (PLAIN, Layout("inc_plain", 0, torch.int32, 1)):
        check(random_weight(WeightSpec(100, 20, 4, 32, False, layout=layout)), level, (1, 5))


def test_every_code_and_zero_point(level: int) -> None:
    """All 65536 pairs of 8 bits at scale 1: what comes out is a whole number, exactly."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    zeros = torch.arange(256, dtype=torch.uint8).unsqueeze(1)
    weight = QuantizedWeight(WeightSpec(256, 256, 8, 256, False), codes, torch.ones(256, 1).half(), zeros)
    for x in (torch.eye(256), torch.eye(256).bfloat16()):
        got = multiply(x, arrange(weight.pack()), level).float()
        expected = weight.dequantize().T
        assert torch.equal(got, expected.to(x.dtype).float())


def test_runs_and_threads_agree_to_the_bit(level: int) -> None:
    weight = random_weight(WeightSpec(1024, 520, 4, 128, False)).pack()
    before = torch.get_num_threads()
    try:
        for int8, m in itertools.product((False, True), (1, 5, 40, 300)):
            state, x = arrange(weight, int8=int8), tokens(m, 1024, torch.bfloat16)
            torch.set_num_threads(1)
            first = multiply(x, state, level)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(multiply(x, state, level), first)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("int8", [False, True], ids=["exact", "int8"])
def test_what_is_not_finite_stays_so(level: int, int8: bool) -> None:
    """And harms no other token."""
    state = arrange(random_weight(WeightSpec(128, 32, 4, 64, False)).pack(), int8=int8)
    for dtype, bad in itertools.product(DTYPES, (float("nan"), float("inf"))):
        x = tokens(3, 128, dtype)
        x[1, 70] = bad
        y = multiply(x, state, level)
        assert not torch.isfinite(y[1]).any()
        assert torch.isfinite(y[[0, 2]]).all()
    zero = multiply(torch.zeros(2, 128), state, level)
    assert torch.equal(zero, torch.zeros(2, 32))


def test_results_round_to_nearest_even(level: int) -> None:
    """And those that a 16-bit float cannot hold become infinite: as torch does it."""
    values = torch.tensor(
        [1.00390625, 1.01171875, 65519.0, 65520.0, 3.4e38, 1e-7, 3e-8, 2.9e-8, 6.1e-5, -0.1]
    )
    codes = torch.zeros(10, 32, dtype=torch.uint8)
    codes[:, 0] = 1
    spec = WeightSpec(32, 10, 8, 32, False, scale_dtype=torch.float32)
    weight = QuantizedWeight(spec, codes, values.unsqueeze(1), torch.zeros(10, 1, dtype=torch.uint8))
    state = arrange(weight.pack())
    for dtype in DTYPES:
        x = torch.zeros(1, 32, dtype=dtype)
        x[0, 0] = 1
        assert torch.equal(multiply(x, state, level).flatten(), values.to(dtype))


def forms(k: int) -> Iterator[Tensor]:
    """Activations that are no plain matrix."""
    wide = tokens(20, 2 * k + 1, torch.bfloat16)
    yield wide[:5, 1 : k + 1]
    yield wide.flatten()[1 : 1 + 4 * k].view(4, k)
    yield wide[:5, : 2 * k : 2]
    yield wide[:6, :k].reshape(2, 3, k).transpose(0, 1)
    yield wide[0, :k]
    yield wide[:0, :k]


def test_any_form_of_activations_and_nothing_is_changed() -> None:
    weight = random_weight(WeightSpec(160, 48, 4, 32, False))
    packed, backend = weight.pack(), load("cpu")
    before = {name: t.clone() for name, t in packed.tensors().items()}
    state = backend.prepare(packed, Target(CPU, torch.bfloat16))
    assert all(torch.equal(t, before[name]) for name, t in packed.tensors().items())
    for x in forms(160):
        given = x.clone()
        y = backend.apply(x, state)
        assert torch.equal(x, given)
        assert y.shape == (*x.shape[:-1], 48)
        if x.numel():
            assert_close(y.reshape(-1, 48), x.reshape(-1, 160), weight, rounded_weights=False)


def operands(state: CpuState, x: Tensor) -> tuple[object, ...]:
    s = state
    return (
        x,
        s.weight,
        s.scales,
        s.zeros,
        s.table,
        s.order,
        s.out_features,
        s.bits,
        s.zero,
        s.int8,
        BEST,
        -1,
    )


@pytest.mark.parametrize("desc_act", [False, True])
def test_the_operator_is_well_registered(desc_act: bool) -> None:
    state = arrange(random_weight(WeightSpec(64, 16, 4, 32, False, desc_act)).pack())
    library.opcheck(torch.ops.woq.cpu_linear.default, operands(state, torch.randn(3, 64)))


def test_inference_mode_and_compile() -> None:
    weight = random_weight(WeightSpec(64, 16, 4, 32, False)).pack()
    backend = CpuBackend()
    state = backend.prepare(weight, Target(CPU, torch.float32))
    x = torch.randn(2, 3, 64)
    with torch.inference_mode():
        eager = backend.apply(x, state)
        compiled = torch.compile(lambda x: backend.apply(x, state) + 1, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), eager + 1)


def test_compute_dtype_is_a_permission() -> None:
    weight = random_weight(WeightSpec(64, 16, 4, 32, False)).pack()
    backend = CpuBackend()
    x = torch.randn(2, 64)
    exact = backend.apply(x, backend.prepare(weight, Target(CPU, torch.float32)))
    for asked in ("fp32", "fp16", "bf16"):
        state = backend.prepare(weight, Target(CPU, torch.float32, asked))  # type: ignore[arg-type]
        assert torch.equal(backend.apply(x, state), exact)
    int8 = backend.apply(x, backend.prepare(weight, Target(CPU, torch.float32, "int8")))
    assert not torch.equal(int8, exact)
    assert (int8 - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("x", torch.randn(3, 100), "100 columns"),
        ("x", torch.randn(3, 0), "0 columns"),
        ("x", torch.tensor(1.0), "contiguous"),
        ("x", torch.randn(64, 3).T, "contiguous"),
        ("x", torch.ones(3, 64, dtype=torch.int32), "float32, float16"),
        ("bits", 8, "weight must be"),
        ("bits", 5, "2, 3, 4 or 8"),
        ("out_features", 33, "33 rows"),
        ("scales", torch.ones(2, 2, 15), "scales"),
        ("zeros", torch.ones(2, 2, 16, dtype=torch.int32), "zeros"),
        ("order", torch.zeros(63, dtype=torch.int32), "order"),
        ("table", torch.zeros(15), "table"),
        ("level", 6, "no kernels of level 6"),
    ],
)
def test_what_would_read_out_of_bounds_is_refused(name: str, value: object, told: str) -> None:
    state = arrange(random_weight(WeightSpec(64, 16, 4, 32, False)).pack())
    names = [
        "x",
        "weight",
        "scales",
        "zeros",
        "table",
        "order",
        "out_features",
        "bits",
        "zero",
        "int8",
        "level",
        "matmul_from",
    ]
    given = dict(zip(names, operands(state, torch.randn(3, 64)), strict=True)) | {name: value}
    with pytest.raises(RuntimeError, match=told):
        torch.ops.woq.cpu_linear(*given.values())


def test_other_dtypes_are_refused_with_the_reason() -> None:
    reason = CpuBackend().why_not(WeightSpec(64, 16, 4, 32, True), Target(CPU, torch.float64))
    assert reason is not None
    assert "not in torch.float64" in reason
