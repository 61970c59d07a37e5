"""What a kernel must compute, and how far rounding lets it stray: shared by the tests of all GPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from woq.weights import QuantizedWeight, WeightSpec


def random_weight(
    spec: WeightSpec, *, device: str = "cpu", seed: int = 0, irregular_order: bool = False
) -> QuantizedWeight:
    """Codes, zero points and scales of both signs, uniformly random; with `spec.desc_act` a random g_idx."""
    gen = torch.Generator().manual_seed(seed)
    n, k, g, top = spec.out_features, spec.in_features, spec.groups, 1 << spec.bits
    scales = (torch.rand(n, g, generator=gen) + 0.5) * torch.randn(n, g, generator=gen).sign() * 0.01
    zeros = torch.randint(0, top, (n, g), generator=gen) if not spec.sym else torch.full((n, g), top // 2)
    g_idx = None
    if spec.desc_act:
        g_idx = torch.arange(k) // spec.group_size
        g_idx = g_idx[torch.randperm(k, generator=gen)]
        if irregular_order:
            g_idx[:2] = 0
    weight = QuantizedWeight(
        spec=spec,
        codes=torch.randint(0, top, (n, k), generator=gen, dtype=torch.uint8).to(device),
        scales=scales.to(spec.scale_dtype).to(device),
        zeros=zeros.to(torch.uint8).to(device),
        g_idx=None if g_idx is None else g_idx.to(torch.int32).to(device),
    )
    return weight


def assert_close(y: Tensor, x: Tensor, weight: QuantizedWeight, *, rounded_weights: bool) -> None:
    """`y` against x @ W.T in float64, element by element.

    The bound is made of what the arithmetic may lose, with u = half the spacing of the dtype at 1:
    the result is rounded once (u); weights, where the kernel rounds them, up to three times: zero point and scale
    folded, scale, product (3 u of sum |x| |w|); float32 sums of up to 128 terms, then of the groups (2^-22 each, of
    sum |x| |s| 2^(bits+2), which covers kernels that carry an offset of a few times 2^bits in every code).
    """
    spec = weight.spec
    dense = weight.dequantize(torch.float64)
    scale = weight.scales.double().abs()[:, weight.groups_of_inputs()]
    u = torch.finfo(x.dtype).eps / 2
    x64 = x.double()
    expected = x64 @ dense.T
    terms = min(spec.in_features, 128) + spec.in_features / 32
    slack = terms * 2.0**-22 * (x64.abs() @ scale.T) * 2.0 ** (spec.bits + 2)
    if rounded_weights:
        slack = slack + 3 * u * (x64.abs() @ dense.abs().T)
    bound = u * expected.abs() + slack + torch.finfo(x.dtype).tiny
    error = (y.double() - expected).abs()
    assert torch.isfinite(y).all(), "some outputs were not written, or overflowed"
    worst = (error / bound).max().item()
    assert worst <= 1.0, f"error is {worst:.2f} times its bound for {spec}, {x.dtype}, {x.shape[0]} tokens"


def tokens(m: int, k: int, dtype: torch.dtype, *, device: str = "cpu", seed: int = 1) -> Tensor:
    """Random activations [m, k]."""
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)
