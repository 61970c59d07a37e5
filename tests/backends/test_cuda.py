"""The CUDA kernels: layout and refusals on any machine, everything computed against float64 where there is a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import library

from benchmarks.sweep_cuda import PREFILL
from tests.backends.kernel_oracle import assert_close, random_weight, tokens
from woq.backends.base import Target
from woq.backends.cuda import CudaBackend, CudaState, _register, arrange, dequantize
from woq.backends.cuda_layout import pack_scales, pack_weight
from woq.errors import BackendError
from woq.weights import WeightSpec

CPU = torch.device("cpu")
BF16 = Target(torch.device("cuda"), torch.bfloat16)
DTYPES = [torch.bfloat16, torch.float16]


def code_at(block: torch.Tensor, bits: int, row: int, column: int) -> int:
    """One code of a block of 64 x 64, read the way the comment in csrc/cuda/dequant.cuh describes."""
    tile, upper, r = row // 16, row // 8 % 2, row % 8
    step, right, c, e = column // 16, column // 8 % 2, column % 8 // 2, column % 2
    lane, register = 4 * r + c, 2 * right + upper
    words = [int(w) for w in block]
    if bits == 4:
        return words[(tile * 32 + lane) * 4 + step] >> (4 * register + 16 * e) & 15
    if bits == 8:
        word = words[((2 * tile + step // 2) * 32 + lane) * 4 + 2 * (step % 2) + register // 2]
        return word >> (8 * (register % 2) + 16 * e) & 255
    if bits == 2:
        return words[(tile * 32 + lane) * 2 + step // 2] >> (2 * (4 * (step % 2) + register) + 16 * e) & 3
    first, second = words[(tile * 32 + lane) * 2 :][:2]
    third, byte = words[256 + tile * 32 + lane], 8 * (step % 2) + 16 * e
    if step < 2 or right == 0:
        return (third if step >= 2 else second if right else first) >> (byte + 3 * upper) & 7
    lower_bits = (second if upper else first) >> (byte + 6) & 3
    return lower_bits | (third >> (byte + 6 + upper) & 1) << 2


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_layout_is_what_the_kernels_document(bits: int) -> None:
    n, k = 70, 130
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack_weight(codes, bits)
    assert packed.shape == (2, 3, 128 * bits)
    for row in range(0, n, 3):
        for column in range(row % 5, k, 5):
            block = packed[row // 64, column // 64]
            assert code_at(block, bits, row % 64, column % 64) == codes[row, column]


def byte_fragment(block: torch.Tensor, bits: int, step: int, tile: int, lane: int) -> list[list[int]]:
    """Four registers of four bytes, made as Bytes::fragment of csrc/cuda/dequant.cuh makes them."""
    words = [int(w) & 0xFFFFFFFF for w in block]

    def split(word: int) -> list[int]:
        return [word >> (8 * i) & 255 for i in range(4)]

    registers = []
    for v in range(2):
        if bits == 4:
            word = words[(tile * 32 + lane) * 4 + 2 * step + v]
            registers += [split(word & 0x0F0F0F0F), split(word & 0xF0F0F0F0)]
        elif bits == 8:
            first = ((2 * tile + step) * 32 + lane) * 4 + 2 * v
            one, two = split(words[first]), split(words[first + 1])
            registers += [[one[u], two[u], one[u + 2], two[u + 2]] for u in range(2)]
        elif bits == 2:
            word = words[(tile * 32 + lane) * 2 + step] >> (4 * v)
            registers += [split(word & 0x03030303), split(word & 0x0C0C0C0C)]
        else:
            one, two, three = *words[(tile * 32 + lane) * 2 :][:2], words[256 + tile * 32 + lane]
            if step == 0 or v == 0:
                word = three if step else two if v else one
                registers += [split(word & 0x07070707), split(word & 0x38383838)]
            else:
                registers.append(split(one >> 6 & 0x03030303 | three >> 4 & 0x04040404))
                registers.append(split(two >> 3 & 0x18181818 | three >> 2 & 0x20202020))
    return registers


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_operands_of_integer_products(bits: int) -> None:
    """Every byte of a register is a code of one row, times one power of two, of the input that x's digits assume."""
    codes = torch.randint(
        0, 1 << bits, (64, 64), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    block = pack_weight(codes, bits)[0, 0]
    lower = {2: 4, 3: 8, 4: 16, 8: 1}[bits]
    for step, tile, lane in itertools.product(range(2), range(4), range(32)):
        for register, found in enumerate(byte_fragment(block, bits, step, tile, lane)):
            v, upper = register // 2, register % 2
            for byte, value in enumerate(found):
                e, b = byte // 2, byte % 2
                j, right = (2 * step + v, b) if bits >= 4 else (2 * step + b, v)
                column = 16 * j + 8 * right + 2 * (lane % 4) + e
                code = int(codes[16 * tile + 8 * upper + lane // 4, column])
                assert value == code * (lower if upper else 1)


def test_scales_of_a_thread_are_neighbours() -> None:
    scales, zeros = torch.randn(100, 3).half(), torch.randint(0, 16, (100, 3), dtype=torch.uint8)
    packed = pack_scales(scales, zeros)
    assert packed.shape == (2, 3, 192)
    values = packed[..., :128].contiguous().view(torch.float16)
    for row in range(100):
        place = row % 8 * 8 + row % 64 // 16 * 2 + row // 8 % 2
        assert torch.equal(values[row // 64, :, place], scales[row])
        assert torch.equal(packed[row // 64, :, 128 + place], zeros[row])


def test_irregular_groups_are_refused() -> None:
    weight = random_weight(WeightSpec(128, 64, 4, 32, True, desc_act=True), irregular_order=True)
    with pytest.raises(BackendError, match="g_idx"):
        arrange(weight)


@pytest.mark.parametrize(
    ("spec", "target", "part"),
    [
        (WeightSpec(64, 64, 5, 32, True), BF16, "5"),
        (WeightSpec(64, 64, 4, 48, True), BF16, "multiple of 32"),
        (WeightSpec(64, 64, 4, 32, True, scale_dtype=torch.float32), BF16, "float32"),
        (WeightSpec(64, 64, 4, 32, True), Target(torch.device("cuda"), torch.float32), "float32"),
        (WeightSpec(64, 64, 4, 32, True), Target(CPU, torch.bfloat16), "NVIDIA"),
    ],
)
def test_why_not_gives_the_reason(spec: WeightSpec, target: Target, part: str) -> None:
    reason = CudaBackend().why_not(spec, target)
    assert reason is not None
    assert part in reason


# ------------------------------------------------------------------------------------------------ on a GPU
def run(weight_state: CudaState, x: torch.Tensor, plan: list[int]) -> torch.Tensor:
    """The operator with a plan of its own, its output's memory poisoned first."""
    s = weight_state
    poison = torch.full((x.shape[0], s.out_features), float("nan"), dtype=x.dtype, device=x.device)
    del poison  # the caching allocator hands this block out again
    y: torch.Tensor = torch.ops.woq.cuda_linear(
        x, s.weight, s.scales, s.order, s.out_features, s.bits, s.group_size, s.scale_is_bf16, True, plan
    )
    return y


def prepared(spec: WeightSpec, dtype: torch.dtype) -> tuple[CudaState, object]:
    weight = random_weight(spec, device="cuda")
    backend = CudaBackend()
    assert backend.why_not(spec, Target(torch.device("cuda"), dtype)) is None
    return backend.prepare(weight.pack(), Target(torch.device("cuda"), dtype)), weight


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("group_size", "sym"),
    [(32, True), (32, False), (64, False), (128, True), (128, False), (96, True), (1000, False)],
)
def test_every_path_matches_the_reference(dtype: torch.dtype, bits: int, group_size: int, sym: bool) -> None:
    spec = WeightSpec(1000, 200, bits, group_size, sym, scale_dtype=dtype)
    state, weight = prepared(spec, dtype)
    for m in (1, 3, 8, 9, 16, 17, 33, 64, 100, 1100):
        x = tokens(m, 1000, dtype, device="cuda", seed=m)
        y = run(state, x, [])
        assert_close(y, x, weight, rounded_weights=m > 8)
        assert torch.equal(y, run(state, x, [])), "repeated runs differ"


PLANS = [
    [4, 1, 3, 4, 0],
    [8, 1, 2, 8, 0],
    [1, 1, 2, 1, 0],
    [4, 2, 2, 2, 2],
    [2, 2, 2, 8, 0],
    [4, 2, 4, 2, 0],
    [2, 4, 3, 4, 3],
    [8, 1, 3, 1, 5],
]
LARGEST = 4  # plans of the list that fit into shared memory with 32 tokens


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("plan", "m"), [(p, m) for p in PLANS for m in (1, 8, 16)] + [(p, 32) for p in PLANS[:LARGEST]]
)
def test_every_decode_plan_gives_the_same_product(plan: list[int], m: int) -> None:
    state, weight = prepared(WeightSpec(1024, 1000, 4, 128, False), torch.bfloat16)
    x = tokens(m, 1024, torch.bfloat16, device="cuda")
    assert_close(run(state, x, plan), x, weight, rounded_weights=False)


def prefill_only() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma is sm_90a's")


@pytest.mark.gpu
@pytest.mark.parametrize("split", [0, 1, 2, 3, 4, 8])
@pytest.mark.parametrize("tile", PREFILL)
@pytest.mark.parametrize("group_size", [64, 128])
def test_every_prefill_plan_gives_the_same_product(
    tile: tuple[int, int], split: int, group_size: int
) -> None:
    prefill_only()
    state, weight = prepared(WeightSpec(2088, 600, 4, group_size, False), torch.float16)
    # Narrow tiles scale sums, not weights; so do those of up to 32 tokens if a turn's inputs share scales.
    rounded = tile[0] > 32 or (tile[0] > 8 and group_size < 128)
    for m in (tile[0] - 3, 2 * tile[0] + 1):
        x = tokens(m, 2088, torch.float16, device="cuda")
        y = run(state, x, [*tile, 0, split])
        assert_close(y, x, weight, rounded_weights=rounded)
        assert torch.equal(y, run(state, x, [*tile, 0, split])), "repeated runs differ"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("group_size", "sym"), [(32, False), (96, True), (128, True), (128, False), (1000, False)]
)
def test_narrow_tiles_in_every_width(dtype: torch.dtype, bits: int, group_size: int, sym: bool) -> None:
    prefill_only()
    spec = WeightSpec(1000, 300, bits, group_size, sym, scale_dtype=torch.float16)
    state, weight = prepared(spec, dtype)
    for m, plan in [(3, [8, 2, 0, 0]), (8, [8, 4, 0, 3]), (13, [8, 2, 0, 1])]:
        x = tokens(m, 1000, dtype, device="cuda", seed=m)
        assert_close(run(state, x, plan), x, weight, rounded_weights=False)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", PREFILL)
@pytest.mark.parametrize("more", [5, 8])
def test_more_tiles_than_thread_blocks(tile: tuple[int, int], more: int) -> None:
    """Whole tiles in waves, then shares of what is left over; an odd number of outputs, and one that TMA can store."""
    prefill_only()
    state, weight = prepared(WeightSpec(456, 64 * 4 * 61 + more, 4, 128, True), torch.bfloat16)
    for tiles in (3, 6):
        x = tokens(tiles * tile[0] - 1, 456, torch.bfloat16, device="cuda")
        for split in (0, 1):
            assert_close(run(state, x, [*tile, 0, split]), x, weight, rounded_weights=True)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [(128, 2), (128, 3), (128, 4), (256, 2)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_more_tokens_than_the_cache_holds(tile: tuple[int, int], bits: int) -> None:
    """Tiles go through bands of tokens, the last one narrower than the others."""
    prefill_only()
    state, weight = prepared(WeightSpec(8192, 648, bits, 64, False), torch.bfloat16)
    x = tokens(2600, 8192, torch.bfloat16, device="cuda")
    for split in (0, 1):
        assert_close(run(state, x, [*tile, 0, split]), x, weight, rounded_weights=True)


@pytest.mark.gpu
def test_graph_replays_of_shared_tiles_on_two_streams() -> None:
    """Sums left in memory are marked by launch: neither a replay nor another stream may take old ones for new."""
    prefill_only()
    state, _ = prepared(WeightSpec(2048, 1024, 4, 128, True), torch.bfloat16)
    inputs = [tokens(100, 2048, torch.bfloat16, device="cuda", seed=seed) for seed in range(4)]
    expected = [run(state, x, [64, 4, 0, 1]) for x in inputs]
    streams, graphs, x = (
        [torch.cuda.Stream() for _ in range(2)],
        [],
        [torch.empty_like(inputs[0]) for _ in range(2)],
    )
    out = []
    for stream, given in zip(streams, x, strict=True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out.append([run(state, given, [64, 4, 0, 1]) for _ in range(3)])
        graphs.append(graph)
    torch.cuda.synchronize()
    for turn in range(12):
        for i in range(2):
            with torch.cuda.stream(streams[i]):
                x[i].copy_(inputs[(turn + i) % 4])
                graphs[i].replay()
        torch.cuda.synchronize()
        for i in range(2):
            assert all(torch.equal(y, expected[(turn + i) % 4]) for y in out[i])


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_far_apart(dtype: torch.dtype, bits: int) -> None:
    """Digits (csrc/cuda/decode_digits.cuh) are relative to the largest of 128 inputs: outliers must not drown the others."""
    state, weight = prepared(WeightSpec(1024, 136, bits, 128, False), dtype)
    for m in (1, 2, 3, 8):
        x = tokens(m, 1024, dtype, device="cuda", seed=m)
        x[:, 3::100] *= 3000
        x[:, 512:640] = 0
        x[:, 640:768] *= 2.0**-20
        assert_close(run(state, x, []), x, weight, rounded_weights=False)


@pytest.mark.gpu
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("m", [2, 5, 12])
def test_what_is_not_finite_is_seen_in_its_token_alone(m: int, value: float) -> None:
    state, _ = prepared(WeightSpec(512, 136, 4, 128, True), torch.bfloat16)
    x = tokens(m, 512, torch.bfloat16, device="cuda")
    expected = run(state, x, [])
    x[1, 300] = value
    y = run(state, x, [])
    assert not torch.isfinite(y[1]).any()
    assert torch.equal(y[[0, *range(2, m)]], expected[[0, *range(2, m)]])


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1000, 1001, 64, 72, 4096])
@pytest.mark.parametrize("m", [1, 2, 7, 20, 90])
def test_activation_order_and_ragged_inputs(k: int, m: int) -> None:
    state, weight = prepared(WeightSpec(k, 77, 4, 32, False, desc_act=True), torch.bfloat16)
    x = tokens(m, k, torch.bfloat16, device="cuda")
    assert_close(run(state, x, []), x, weight, rounded_weights=m > 8)
    dense = dequantize(state, x, k)
    torch.testing.assert_close(dense, weight.dequantize(torch.bfloat16))


@pytest.mark.gpu
def test_a_very_wide_input_is_cut_into_fewer_tokens() -> None:
    state, weight = prepared(WeightSpec(53248, 128, 4, 128, True), torch.bfloat16)
    x = tokens(32, 53248, torch.bfloat16, device="cuda")
    assert_close(run(state, x[:8], []), x[:8], weight, rounded_weights=False)
    assert_close(run(state, x, []), x, weight, rounded_weights=True)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [14336, 53248, 131072])
def test_rows_of_a_wide_input_in_any_order(k: int) -> None:
    """They lie beside the stages in shared memory where there is room, else they are gathered first."""
    state, weight = prepared(WeightSpec(k, 128, 4, 128, True, desc_act=True), torch.bfloat16)
    x = tokens(2, k, torch.bfloat16, device="cuda")
    for m in (1, 2):
        y = run(state, x[:m], [])
        assert_close(y, x[:m], weight, rounded_weights=False)
        assert torch.equal(y, run(state, x[:m], [])), "repeated runs differ"


@pytest.mark.gpu
def test_leading_dimensions_offsets_and_empty_batches() -> None:
    state, weight = prepared(WeightSpec(256, 128, 4, 128, True), torch.bfloat16)
    backend = CudaBackend()
    x = tokens(6, 256, torch.bfloat16, device="cuda")
    y = backend.apply(x.view(2, 3, 256), state)
    assert y.shape == (2, 3, 128)
    assert_close(y.view(6, 128), x, weight, rounded_weights=False)
    shifted = torch.empty(6 * 256 + 1, dtype=x.dtype, device="cuda")[1:].view(6, 256).copy_(x)
    assert torch.equal(backend.apply(shifted, state), y.view(6, 128))
    assert backend.apply(x[:0], state).shape == (0, 128)


@pytest.mark.gpu
def test_operator_is_well_behaved() -> None:
    """opcheck: schema, fake implementation, autograd registration, tracing."""
    state, weight = prepared(WeightSpec(256, 128, 4, 128, True), torch.bfloat16)
    _register()
    x = tokens(4, 256, torch.bfloat16, device="cuda").requires_grad_()
    s = state
    args = (x, s.weight, s.scales, s.order, 128, s.bits, s.group_size, s.scale_is_bf16, True, [])
    library.opcheck(torch.ops.woq.cuda_linear, args)
    torch.ops.woq.cuda_linear(*args).sum().backward()
    expected = weight.dequantize(torch.float32).sum(0).expand(4, -1)
    torch.testing.assert_close(x.grad.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.gpu
def test_cuda_graph_replays_a_chain_of_dependent_layers() -> None:
    """Early launch must not let a layer read its input before the layer before has written it."""
    state, _ = prepared(WeightSpec(512, 512, 4, 128, True), torch.bfloat16)
    backend = CudaBackend()
    x = tokens(4, 512, torch.bfloat16, device="cuda")

    def chain(v: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            v = backend.apply(v, state)
        return v

    expected = chain(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(x)
    for _ in range(5):
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, expected)
    step = x
    for _ in range(20):
        step = backend.apply(step, state)
        torch.cuda.synchronize()
    assert torch.equal(step, expected)
