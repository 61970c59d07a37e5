"""GPTQ against a textbook version in float64, and every order and setting against round-to-nearest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from woq.algorithms import build
from woq.algorithms.base import LayerResult
from woq.algorithms.hessian import inverse_factor
from woq.algorithms.rounding import round_columns
from woq.algorithms.rtn import round_to_nearest
from woq.configs import GPTQConfig, RtnConfig
from woq.errors import CalibrationError, QuantizationError
from woq.quant import dequantize, group_params, quantize
from woq.replay import BlockCall, BlockInputs
from woq.weights import Layout, PackedWeight, WeightSpec

K, N, GROUP = 64, 24, 16

ORDERS: dict[str, dict[str, Any]] = {
    "stored": {"act_group_aware": False},
    "desc_act": {"desc_act": True},
    "static_groups": {"desc_act": True, "static_groups": True},
    "act_group_aware": {"act_group_aware": True},
}


class Attention(nn.Module):
    """Three linears of one input and a fourth behind them: enough to be a block."""

    def __init__(self, features: int = K, rows: int = N) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(features, rows, bias=False) for _ in range(3))
        self.o = nn.Linear(rows, features, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.o(self.q(hidden) * self.k(hidden).sigmoid() + self.v(hidden))


def correlated(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Activations as in language models: correlated, a few features much larger than the rest."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features // 4, generator=g) @ torch.randn(features // 4, features, generator=g)
    x = x + 0.3 * torch.randn(tokens, features, generator=g)
    x[:, ::9] *= 4
    return x


def block_and_inputs(x: Tensor | None = None) -> tuple[Attention, BlockInputs]:
    torch.manual_seed(0)
    block = Attention()
    x = correlated(400, K) if x is None else x
    batches = [part.unsqueeze(0) for part in x.chunk(4)]
    inputs = BlockInputs(
        torch.device("cpu"), batches, [BlockCall((), {})] * len(batches), [None] * len(batches)
    )
    return block, inputs


def spec_of(linear: nn.Linear, bits: int = 3, group_size: int = GROUP, **fields: Any) -> WeightSpec:
    size = linear.in_features if group_size == -1 else min(group_size, linear.in_features)
    sym = fields.pop("sym", True)
    return WeightSpec(linear.in_features, linear.out_features, bits, size, sym, **fields)


def run(
    block: Attention,
    inputs: BlockInputs,
    names: str = "qkvo",
    bits: int = 3,
    group_size: int = GROUP,
    **config: Any,
) -> dict[str, LayerResult]:
    settings = GPTQConfig(bits=bits, group_size=group_size, **config)
    specs = {
        name: spec_of(
            block.get_submodule(name),  # type: ignore[arg-type]
            bits,
            group_size,
            sym=settings.sym,
            desc_act=settings.run_time_order and group_size != -1,
        )
        for name in names
    }
    return build(settings).quantize_block(block, specs, inputs)


# --- the oracle --------------------------------------------------------------------------------------------------


def textbook(weight: Tensor, x: Tensor, bits: int, group_size: int, sym: bool, damping: float) -> Tensor:
    """Optimal Brain Quantization in stored order: round a column, move all later ones, shrink the inverse.

    float64, one column at a time, the full inverse Hessian updated by elimination as in the paper's equations (2)
    and (3): no Cholesky factor, no blocks. Grids are chosen when a group's first column is reached.
    """
    w, codes = weight.double().clone(), torch.zeros(weight.shape)
    h = x.double().t() @ x.double() / len(x)
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    inverse = torch.linalg.inv(h)
    for k in range(w.shape[1]):
        if k % group_size == 0:
            scale, zero = group_params(w[:, k : k + group_size].float(), bits, sym, torch.float16)
        codes[:, k] = quantize(w[:, k], scale.double(), zero.double(), bits)
        error = (w[:, k] - dequantize(codes[:, k].double(), scale.double(), zero.double())) / inverse[k, k]
        w[:, k:] -= error.unsqueeze(1) * inverse[k, k:]
        inverse = inverse - torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return codes.to(torch.uint8)


@pytest.mark.parametrize("block_size", [5, 128])
@pytest.mark.parametrize(
    ("bits", "group_size", "sym"), [(4, 16, True), (3, 16, False), (2, -1, True), (4, -1, False)]
)
def test_codes_are_the_textbook_ones(bits: int, group_size: int, sym: bool, block_size: int) -> None:
    x = correlated(400, K)
    block, inputs = block_and_inputs(x)
    expected = textbook(block.q.weight.detach(), x, bits, K if group_size == -1 else group_size, sym, 0.05)
    settings = {"damp_percent": 0.05, "act_group_aware": False, "search": "mse", "refine": 0}
    result = run(block, inputs, "q", bits, group_size, sym=sym, block_size=block_size, **settings)["q"]
    # float32 against float64: a weight that lies on the border of two codes may fall on either side.
    same = (result.weight.codes == expected).double().mean()
    assert same > 0.97
    assert result.damping == 0.05
    assert result.tokens == 400


def test_column_loop_without_correlation_is_rounding(rng: torch.Generator) -> None:
    """H = I: nothing can absorb anything, so GPTQ is round-to-nearest."""
    w = torch.randn(6, 32, generator=rng)
    scale, zero = group_params(w, 4, False, torch.float32)
    factor = inverse_factor(torch.eye(32), 0.01)
    assert factor is not None
    spans = iter([(0, 10), (10, 32)])
    codes = round_columns(w, factor, 4, spans, lambda start, end, rows: (scale[None], zero[None]))
    nearest = quantize(w, scale.unsqueeze(1), zero.unsqueeze(1), 4)
    assert torch.equal(codes.t(), nearest)


# --- better than rounding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", ["minmax", "mse", "activation"])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_every_order_beats_rounding(order: dict[str, Any], sym: bool, search: str) -> None:
    block, inputs = block_and_inputs()
    x = torch.cat([h[0] for h in inputs.hidden])
    weight = block.q.weight.detach().clone()
    spec = spec_of(block.q, sym=sym)
    nearest = round_to_nearest(weight, spec).dequantize()
    result = run(block, inputs, sym=sym, search=search, **order)["q"]

    def lost(quantized: Tensor) -> float:
        return float((x @ (weight - quantized).t()).square().sum() / (x @ weight.t()).square().sum())

    assert lost(result.weight.dequantize()) < 0.7 * lost(nearest)
    assert result.loss == pytest.approx(lost(result.weight.dequantize()), rel=1e-3)
    assert torch.equal(block.q.weight, result.weight.dequantize())  # written back
    wants_index = order == ORDERS["desc_act"]
    assert (result.weight.g_idx is not None) == wants_index


def test_act_order_groups_are_whole_and_most_excited_first() -> None:
    block, inputs = block_and_inputs()
    excitation = torch.cat([h[0] for h in inputs.hidden]).square().mean(0)
    g_idx = run(block, inputs, desc_act=True)["q"].weight.g_idx
    assert g_idx is not None
    assert g_idx.bincount().tolist() == [GROUP] * (K // GROUP)
    for group in range(K // GROUP - 1):
        assert excitation[g_idx == group].min() >= excitation[g_idx > group].max()


def test_short_last_group() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(40, 8, bias=False), correlated(200, 40)
    block = nn.ModuleDict({"q": linear})
    block.forward = lambda hidden: linear(hidden)  # type: ignore[method-assign]
    inputs = BlockInputs(torch.device("cpu"), [x.unsqueeze(0)], [BlockCall((), {})], [None])
    weight = linear.weight.detach().clone()
    nearest = round_to_nearest(weight, spec_of(linear)).dequantize()
    for order in ORDERS.values():
        with torch.no_grad():
            linear.weight.copy_(weight)
        config = GPTQConfig(bits=3, group_size=GROUP, **order)
        spec = spec_of(linear, desc_act=config.run_time_order)
        result = build(config).quantize_block(block, {"q": spec}, inputs)["q"]
        got = result.weight.pack().unpack().dequantize()
        assert (x @ (weight - got).t()).norm() < (x @ (weight - nearest).t()).norm(), order


def test_true_sequential_sees_what_was_rounded() -> None:
    """The last linear is calibrated on the outputs of the quantized ones, and does better on those."""
    losses = {}
    for sequential in (False, True):
        block, inputs = block_and_inputs()
        weight = block.o.weight.detach().clone()
        block.requires_grad_(False)
        run(block, inputs, bits=2, true_sequential=sequential)
        x = torch.cat([block.q(h[0]) * block.k(h[0]).sigmoid() + block.v(h[0]) for h in inputs.hidden])
        losses[sequential] = float((x @ (weight - block.o.weight).t()).square().sum())
    assert losses[True] < losses[False]


# --- what must not depend on company -----------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_linears_of_one_input_are_rounded_as_if_alone(order: dict[str, Any]) -> None:
    together, inputs = block_and_inputs()
    batched = run(together, inputs, "qkv", **order)
    for name in "qkv":
        alone, inputs = block_and_inputs()
        single = run(alone, inputs, name, **order)[name]
        same = (single.weight.codes == batched[name].weight.codes).double().mean()
        assert same > 0.99, name  # a taller matrix product may round its last bit differently
        assert single.loss == pytest.approx(batched[name].loss, rel=0.02)


def test_mixed_widths_in_one_group() -> None:
    block, inputs = block_and_inputs()
    specs = {"q": spec_of(block.q, 4), "k": spec_of(block.k, 2), "v": spec_of(block.v, 4, -1)}
    results = build(GPTQConfig()).quantize_block(block, specs, inputs)
    assert list(results) == ["q", "k", "v"]
    assert {name: r.weight.spec for name, r in results.items()} == specs
    assert int(results["k"].weight.codes.max()) < 4


# --- the corners -------------------------------------------------------------------------------------------------


def test_unexcited_features_keep_their_own_weight() -> None:
    """Original GPTQ zeroes them: wrong for every input that the calibration data did not contain."""
    x = correlated(400, K)
    dead = torch.tensor([0, 17, 40, 63])
    x[:, dead] = 0
    for order in ORDERS.values():
        block, inputs = block_and_inputs(x)
        weight = block.q.weight.detach().clone()
        result = run(block, inputs, "q", bits=8, **order)["q"]
        assert (result.weight.dequantize()[:, dead] - weight[:, dead]).abs().max() < 0.01 * weight.abs().max()
        assert result.note == ""


def test_fewer_tokens_than_features() -> None:
    block, inputs = block_and_inputs(correlated(8, K))
    result = run(block, inputs, "q")["q"]
    assert result.damping is not None
    assert result.weight.dequantize().isfinite().all()


def test_no_damping_helps_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("woq.algorithms.gptq.factor_with_ladder", lambda hessian, damp_percent: None)
    block, inputs = block_and_inputs()
    weight = block.q.weight.detach().clone()
    result = run(block, inputs, "q")["q"]
    assert "not positive definite" in result.note
    assert "rounded to nearest" in result.note
    assert result.damping is None
    assert torch.equal(result.weight.codes, round_to_nearest(weight, result.weight.spec).codes)


def test_one_sided_symmetric_weights_are_not_clipped() -> None:
    """The rule GPTQ inherited gives such a group scale max/15 with zero 8: its largest weight loses 53 %."""
    for search in ("minmax", "mse"):
        block, inputs = block_and_inputs()
        with torch.no_grad():
            block.q.weight.abs_()
        weight = block.q.weight.detach().clone()
        got = run(block, inputs, "q", bits=4, search=search)["q"].weight.dequantize()
        largest = weight.argmax(1, keepdim=True)
        assert (got.gather(1, largest) > 0.75 * weight.gather(1, largest)).all(), search


def test_not_finite_is_named() -> None:
    block, inputs = block_and_inputs()
    inputs.hidden[2][0, 7, 3] = float("nan")
    with pytest.raises(CalibrationError, match=r"'q'.*NaN or infinite in 1 of"):
        run(block, inputs)
    block, inputs = block_and_inputs()
    with torch.no_grad():
        block.k.weight[2, 5] = float("inf")
    with pytest.raises((QuantizationError, CalibrationError), match=r"NaN or infinite|not finite"):
        run(block, inputs)


def test_twice_is_the_same_to_the_bit() -> None:
    first, second = (run(*block_and_inputs(), desc_act=True) for _ in range(2))
    for name, result in first.items():
        for part, tensor in result.weight.pack().tensors().items():
            assert torch.equal(tensor, second[name].weight.pack().tensors()[part]), (name, part)


def test_padding_moves_no_statistic() -> None:
    """Rows under the mask may hold anything."""
    x = correlated(40, K)
    results = []
    for filling in (0.0, 100.0):
        padded = torch.full((2, 30, K), filling)
        padded[0, :25], padded[1, :15] = x[:25], x[25:]
        mask = torch.zeros(2, 30, dtype=torch.bool)
        mask[0, :25] = mask[1, :15] = True
        block, _ = block_and_inputs()
        inputs = BlockInputs(torch.device("cpu"), [padded], [BlockCall((), {})], [mask])
        results.append(run(block, inputs)["q"])
    assert results[0].tokens == results[1].tokens == 40
    assert torch.equal(results[0].weight.codes, results[1].weight.codes)


def test_rtn_needs_no_inputs() -> None:
    block, _ = block_and_inputs()
    algorithm = build(RtnConfig(bits=3, group_size=GROUP))
    assert not algorithm.needs_data
    assert build(GPTQConfig()).needs_data
    specs = {"q": spec_of(block.q)}
    assert algorithm.quantize_block(block, specs, None)["q"].tokens is None


def test_linears_that_no_stage_lists_come_last() -> None:
    """The output head has no name inside a block, whatever `modules_in_block_to_quantize` lists."""
    block, inputs = block_and_inputs()
    results = run(block, inputs, "qkvo", modules_in_block_to_quantize=(("v",), ("q",)))
    assert list(results) == ["q", "k", "v", "o"]


@pytest.mark.parametrize("layout", [Layout(zero_offset=0), Layout("inc_plain", 0, torch.int8, 0)], ids=str)
def test_a_fallback_under_desc_act_still_packs_what_its_spec_promises(layout: Layout) -> None:
    spec = WeightSpec(64, 32, 4, 32, True, desc_act=True, layout=layout)
    packed = round_to_nearest(torch.randn(32, 64), spec).pack()
    assert packed.tensors().keys() == spec.packed_shapes().keys()
    back = PackedWeight.from_tensors(spec, packed.tensors(), "layer").unpack()
    assert torch.equal(back.groups_of_inputs(), torch.arange(64) // 32)


def test_feedback_that_goes_wrong_is_worse_than_nothing_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a broken kernel would: any codes. The layer is then rounded to nearest, and says so."""
    block, inputs = block_and_inputs()
    right = run(block, inputs, "qkvo")
    assert not any("feedback" in result.note for result in right.values())

    def any_codes(weight: Tensor, factor: Tensor, bits: int, spans: Any, grid: Any) -> Tensor:
        codes = round_columns(weight, factor, bits, spans, grid)
        return codes[torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))]

    monkeypatch.setattr("woq.algorithms.gptq.round_columns", any_codes)
    wrong = run(block, inputs, "qkvo", refine=0)
    for name, result in wrong.items():
        assert "error feedback came to" in result.note
        assert result.loss is not None
        assert right[name].loss is not None
        assert result.loss < 20 * right[name].loss  # type: ignore[operator]
