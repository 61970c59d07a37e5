"""Scales as codes: as near as half a step, small on disk, and decoded as the formula says."""

from __future__ import annotations

import itertools

import pytest
import torch

from woq.scales import DoubleQuant, encode


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [8, 256, -1])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_scale_is_the_nearest_of_its_run(
    bits: int, group_size: int, sym: bool, rng: torch.Generator
) -> None:
    how = DoubleQuant(bits, group_size, sym)
    scales = torch.randn(30, 9, generator=rng) * 0.01
    coded = encode(scales, how)
    run = 270 if group_size == -1 else group_size
    assert len(coded.steps) == how.groups(270) == -(-270 // run)
    assert int(coded.codes.max()) < 1 << bits and (coded.offsets is None) == sym
    decoded = coded.decode(how, torch.float32).flatten()
    for i, scale in enumerate(scales.flatten().tolist()):
        step = float(coded.steps[i // run])
        offset = -step * (1 << (bits - 1)) if coded.offsets is None else float(coded.offsets[i // run])
        assert float(decoded[i]) == pytest.approx(offset + step * int(coded.codes.flatten()[i]), abs=1e-8)
        assert abs(float(decoded[i]) - scale) <= step / 2 + 1e-8


def test_a_run_of_equal_scales_and_a_single_scale_are_exact() -> None:
    for shape, sym in itertools.product([(4, 300), (1, 1)], [True, False]):
        scales = torch.full(shape, 0.0123)
        how = DoubleQuant(sym=sym)
        assert torch.allclose(encode(scales, how).decode(how, torch.float32), scales, rtol=1e-6)


def test_the_last_short_run_has_its_own_range() -> None:
    scales = torch.cat([torch.full((1, 256), 100.0), torch.tensor([[1.0, 2.0]])], dim=1)
    how = DoubleQuant()
    assert torch.allclose(encode(scales, how).decode(how, torch.float32)[0, -2:], torch.tensor([1.0, 2.0]))
