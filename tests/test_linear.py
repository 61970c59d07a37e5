"""QuantLinear: the same numbers and gradients as the dequantized linear, on any backend, through moves and saves."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from woq.algorithms.rtn import round_to_nearest
from woq.backends import choose
from woq.backends.base import Target
from woq.errors import BackendError, CheckpointError
from woq.linear import QuantLinear
from woq.weights import GPTQ_V1, PackedWeight, WeightSpec

IN, OUT = 64, 24
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def packed(bits: int = 4, seed: int = 0) -> PackedWeight:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=generator)
    return round_to_nearest(weight, WeightSpec(IN, OUT, bits, 32, True, layout=GPTQ_V1)).pack()


def layer(backend: str = "auto", bits: int = 4) -> QuantLinear:
    return QuantLinear(packed(bits), torch.linspace(-1, 1, OUT), backend)


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    return bool((got.float() - expected).norm() <= TOLERANCE[dtype] * expected.norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 3, IN)])
def test_forward_and_gradient(shape: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator) -> None:
    linear = layer()
    x = torch.randn(shape, generator=rng).to(dtype).requires_grad_()
    y = linear(x)
    assert linear.backend == choose(linear.spec, Target(torch.device("cpu"), dtype)).name
    plain = x.detach().float().requires_grad_()
    assert linear.bias is not None
    expected = F.linear(plain, linear.dequantize(), linear.bias)
    assert y.dtype == dtype
    assert y.shape == (*shape[:-1], OUT)
    assert close(y.detach(), expected.detach(), dtype)
    seed = torch.randn(y.shape, generator=rng)
    y.backward(seed.to(dtype))
    expected.backward(seed.to(dtype).float())
    assert x.grad is not None
    assert plain.grad is not None
    assert x.grad.dtype == dtype
    assert close(x.grad, plain.grad, dtype)
    with torch.no_grad():
        assert torch.equal(linear(x), y)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_an_adapter_on_top_trains(dtype: torch.dtype, rng: torch.Generator) -> None:
    """LoRA between two frozen quantized layers: its gradient flows through the second."""
    torch.manual_seed(0)
    first, second = (
        layer(),
        QuantLinear(round_to_nearest(torch.randn(8, OUT), WeightSpec(OUT, 8, 4, OUT, True)).pack()),
    )
    down, up = nn.Linear(IN, 4, bias=False, dtype=dtype), nn.Linear(4, OUT, bias=False, dtype=dtype)
    nn.init.zeros_(up.weight)
    x, target = torch.randn(32, IN, generator=rng).to(dtype), torch.randn(32, 8, generator=rng)
    optimizer = torch.optim.Adam([*down.parameters(), *up.parameters()], lr=1e-2)
    before = {name: t.clone() for name, t in first.packed.tensors().items()}
    losses = []
    for _ in range(40):
        loss = F.mse_loss(second(first(x) + up(down(x))).float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not any(p.requires_grad for p in (*first.parameters(), *second.parameters()))
    assert all(torch.equal(t, before[name]) for name, t in first.packed.tensors().items())


def test_state_dict_round_trip() -> None:
    model = nn.Sequential(layer(bits=3), nn.ReLU())
    state = {name: t.clone() for name, t in model.state_dict().items()}
    assert set(state) == {f"0.{part}" for part in ("qweight", "qzeros", "scales", "g_idx", "bias")}
    other = nn.Sequential(QuantLinear(packed(3, seed=9), torch.zeros(OUT)), nn.ReLU())
    x = torch.randn(4, IN)
    assert not torch.equal(other(x), model(x))  # and something is prepared that must not survive
    other.load_state_dict(state)
    assert torch.equal(other(x), model(x))


def test_state_dict_that_does_not_fit() -> None:
    model, state = nn.Sequential(layer()), nn.Sequential(layer()).state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.qweight"):
        model.load_state_dict({"0.bias": state["0.bias"]})
    with pytest.raises(CheckpointError, match=r"layer '0'.*'scales' is missing"):
        model.load_state_dict({name: t for name, t in state.items() if name != "0.scales"})
    with pytest.raises(CheckpointError, match=r"layer '0': qweight is"):
        model.load_state_dict({**state, "0.qweight": state["0.qweight"][:1]})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.weight"):
        model.load_state_dict({**state, "0.weight": torch.zeros(1)})


def test_another_dtype_prepares_again() -> None:
    linear, x = layer(), torch.randn(3, IN)
    seen = []
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        seen.append(linear(x.to(dtype)))
        assert linear.backend == choose(linear.spec, Target(torch.device("cpu"), dtype)).name
    assert torch.equal(seen[0], seen[2])
    assert close(seen[1], seen[0], torch.bfloat16)
    linear.to(torch.bfloat16)  # floats move, the packed weight is what the checkpoint holds
    assert linear.packed.scales.dtype == torch.float16
    assert torch.equal(linear(x.bfloat16()).float(), seen[1].float())


def test_asking_for_a_backend_that_cannot() -> None:
    with pytest.raises(BackendError, match="bfloat16 only"):
        layer("torch")(torch.zeros(1, IN))
    with pytest.raises(BackendError, match="unknown backend 'nope'"):
        layer("nope")(torch.zeros(1, IN))


def test_copies_are_apart() -> None:
    linear = layer()
    x = torch.randn(2, IN)
    y = linear(x)
    twin = copy.deepcopy(linear)
    twin.packed.scales.zero_()
    assert torch.equal(linear(x), y)


def test_compiles_whole(rng: torch.Generator) -> None:
    linear, x = layer("reference"), torch.randn(3, IN, generator=rng)
    with torch.no_grad():
        expected = linear(x)
        compiled = torch.compile(linear, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(x), expected, atol=1e-6)
    bf16 = layer()
    with torch.no_grad():
        expected = bf16(x.bfloat16())
        assert torch.equal(torch.compile(bf16, fullgraph=True, backend="eager")(x.bfloat16()), expected)


def test_compiles_whole_before_its_first_input(rng: torch.Generator) -> None:
    linear, x = layer(), torch.randn(3, IN, generator=rng)
    with torch.no_grad():
        compiled = torch.compile(linear, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), layer()(x))
        assert torch.equal(compiled(x.bfloat16()), layer()(x.bfloat16()))
        assert torch.equal(compiled(x), layer()(x))  # prepared for bfloat16, and again for float32
        other = QuantLinear(packed(seed=9), torch.zeros(OUT))
        linear.load_state_dict(other.state_dict())
        assert torch.equal(compiled(x), other(x))


def test_compiles_whole_for_training(rng: torch.Generator) -> None:
    x = torch.randn(3, IN, generator=rng, requires_grad=True)
    (expected,) = torch.autograd.grad(layer()(x).sum(), x)
    (got,) = torch.autograd.grad(torch.compile(layer(), fullgraph=True, backend="aot_eager")(x).sum(), x)
    torch.testing.assert_close(got, expected)


def test_repr_says_what_it_is() -> None:
    assert repr(layer(bits=3)) == "QuantLinear(64, 24, bits=3, group_size=32, sym, backend=auto)"
