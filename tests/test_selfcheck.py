"""A kernel that does not compute what the checkpoint says is found before the model answers anything."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from woq.algorithms.rtn import round_to_nearest
from woq.backends.base import Backend, Target
from woq.errors import BackendError
from woq.linear import QuantLinear
from woq.selfcheck import prepare_and_check, relative_error
from woq.weights import PackedWeight, WeightSpec

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class OffByOne(Backend[PackedWeight]):
    """The classic: v1 zero points read as v2's."""

    name: ClassVar[str] = "off_by_one"

    def why_not(self, spec: WeightSpec, target: Target) -> str | None:
        return None

    def prepare(self, packed: PackedWeight, target: Target) -> PackedWeight:
        return packed

    def apply(self, x: Tensor, state: PackedWeight) -> Tensor:
        weight = state.unpack()
        weight.zeros.sub_(1)
        return nn.functional.linear(x, weight.dequantize(x.dtype))


class NotANumber(OffByOne):
    def apply(self, x: Tensor, state: PackedWeight) -> Tensor:
        return torch.full((*x.shape[:-1], state.spec.out_features), float("nan"), dtype=x.dtype)


def model(bits: int = 4, backend: str = "auto") -> nn.Sequential:
    torch.manual_seed(0)
    spec = WeightSpec(64, 32, bits, 32, False)
    weights = [round_to_nearest(torch.randn(32, 64), spec) for _ in range(3)]
    return nn.Sequential(*(QuantLinear(w.pack(), torch.randn(32), backend) for w in weights))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_right_kernels_pass(bits: int, dtype: torch.dtype) -> None:
    counts = prepare_and_check(model(bits), Target(torch.device("cpu"), dtype))
    assert sum(counts.values()) == 3


OFF_BY_ONE = [(bits, dtype) for bits in (4, 8) for dtype in DTYPES]


@pytest.mark.parametrize(("bits", "dtype"), OFF_BY_ONE)
def test_zero_points_off_by_one(bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("woq.linear.choose", lambda spec, target, requested="auto": OffByOne())
    with pytest.raises(
        BackendError, match=r"layer '0': backend 'off_by_one' is off by \d+\.\d+ of the result on cpu"
    ):
        prepare_and_check(model(bits), Target(torch.device("cpu"), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_a_number(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("woq.linear.choose", lambda spec, target, requested="auto": NotANumber())
    with pytest.raises(BackendError, match="is off by nan"):
        prepare_and_check(model(8), Target(torch.device("cpu"), dtype))


def test_a_layer_of_zeros_is_right() -> None:
    spec = WeightSpec(64, 32, 4, 32, True)
    layer = QuantLinear(round_to_nearest(torch.zeros(32, 64), spec).pack())
    assert relative_error(layer, Target(torch.device("cpu"), torch.bfloat16)) == 0.0


def test_every_distinct_spec_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[WeightSpec] = []
    monkeypatch.setattr("woq.selfcheck.relative_error", lambda layer, target: seen.append(layer.spec) or 0.0)
    both = nn.ModuleList([model(4), model(3)])
    prepare_and_check(both, Target(torch.device("cpu"), torch.float32))
    assert [spec.bits for spec in seen] == [4, 3]
