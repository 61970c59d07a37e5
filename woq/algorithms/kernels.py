"""Which implementation rounds a span, searches a group's grid and trains roundings on a device: a Triton kernel where it proves right.

Each kernel is run once a process and device against the torch version beside it. Where Triton is missing, does not
compile or computes something else, a warning says why, and the torch versions serve: the same codes, many times slower on a GPU.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from woq.algorithms.tunable import FakeQuantize, fake_quantize
from woq.quant import Search, group_factors, group_params, smallest_scale

_SPAN, _ROWS, _BITS = 40, 96, 4  # of the check: sizes that fill no block


def kernels_on(device: torch.device) -> bool:
    """Whether the Triton kernels serve on `device`. The first call on a device tries them out."""
    return device.type != "cpu" and _tried(device) is None


@functools.cache
def _tried(device: torch.device) -> str | None:
    """None where the kernels are right, else what is wrong, which a warning has said."""
    try:
        wrong = check(device)
    except Exception as error:  # noqa: BLE001 - whatever a missing compiler or driver raises; it is told
        wrong = f"{type(error).__name__}: {error}"
    if wrong is not None:
        warnings.warn(
            f"the Triton kernels of GPTQ and AutoRound cannot be used on {device}, quantizing will be slow: {wrong}",
            RuntimeWarning,
            stacklevel=3,
        )
    return wrong


def check(device: torch.device) -> str | None:
    """Run the kernels beside the torch versions on fixed random numbers; what differs, None if nothing does."""
    from woq.algorithms import rounding, rounding_triton

    generator = torch.Generator().manual_seed(0)
    rows, start = torch.randn(2, _SPAN, _ROWS, generator=generator).to(device)
    u = torch.randn(_SPAN, _SPAN, generator=generator).mul_(0.1).triu_(1) + torch.eye(_SPAN) * 0.7
    costs = (torch.rand(_SPAN, generator=generator) + 0.1).to(device)
    u = u.to(device).t().contiguous().t()  # by columns, as LAPACK's factors come
    for sym in (True, False):
        params = group_params(rows.t(), _BITS, sym, torch.float16, "mse", costs)
        searched = _search_in_kernel(rows, _BITS, sym, torch.float16, "mse", costs)
        for what, a, b in zip(("scales", "zeros"), params, searched, strict=True):
            if (a == b).float().mean() < 0.95:  # two candidates may be equally good but for rounding
                return f"the search's {what} differ from torch's by up to {float((a - b).abs().max()):.3g}"
        scale, zero = (t.unsqueeze(0) for t in params)
        pairs: list[tuple[str, Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = [
            ("rounded", rounding.round_span, rounding_triton.round_span, (rows, u)),
            ("swept", rounding.descend_span, rounding_triton.descend_span, (start, rows, u @ u.t())),
        ]
        for what, naive, fused, given in pairs:
            codes, others = torch.empty(2, _SPAN, _ROWS, device=device)
            expected = naive(*given, scale, zero, _BITS, codes)
            found = fused(*given, scale, zero, _BITS, others)
            same = (codes == others).all(0)  # a code on the border of two moves all after it in its row
            if same.float().mean() < 0.9 or not torch.allclose(expected[:, same], found[:, same], atol=1e-4):
                return f"{int((~same).sum())} of {_ROWS} rows are {what} to other codes than torch's"
    return _check_fake_quantize(device)


def fake_quantizer(device: torch.device, longest: int) -> FakeQuantize:
    """`tunable.fake_quantize`, or its kernels. longest: the largest group's size."""
    if kernels_on(device):
        from woq.algorithms.tunable_triton import LONGEST, fused_fake_quantize

        if longest <= LONGEST:
            return fused_fake_quantize
    return fake_quantize


def _check_fake_quantize(device: torch.device) -> str | None:
    """The training's kernels and their gradients beside the torch version's, as `check` does it."""
    from woq.algorithms.tunable_triton import fused_fake_quantize

    generator = torch.Generator().manual_seed(1)
    latent, pull = torch.randn(2, _ROWS, _SPAN, generator=generator).to(device)
    offset = (torch.rand(_ROWS, _SPAN, generator=generator) - 0.5).to(device).requires_grad_()
    scale = (torch.rand(_ROWS, 1, generator=generator) * 0.2 + 0.05).to(device).requires_grad_()
    zero = torch.randint(0, 16, (_ROWS, 1), generator=generator).float().to(device).requires_grad_()
    top = torch.full_like(scale, 15.0, requires_grad=False)
    trained = (offset, scale, zero)
    results = []
    with torch.enable_grad():
        for quantizer in (fake_quantize, fused_fake_quantize):
            weights = quantizer(latent, *trained, top, torch.float32)
            results.append([weights, *torch.autograd.grad((weights * pull).sum(), trained)])
    for what, a, b in zip(("weights", "offset", "scale", "zero"), *results, strict=True):
        wrong = ~torch.isclose(a, b, rtol=1e-3, atol=1e-3)
        if wrong.float().mean() > 0.02:
            return f"training: {what} differs from torch's by up to {float((a - b).abs().max()):.3g}"
    return None


def span_functions(device: torch.device) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """`rounding.round_span` and `rounding.descend_span`, or their kernels."""
    if kernels_on(device):
        from woq.algorithms import rounding_triton

        return rounding_triton.round_span, rounding_triton.descend_span
    from woq.algorithms import rounding

    return rounding.round_span, rounding.descend_span


def search_group(
    rows: Tensor, bits: int, sym: bool, scale_dtype: torch.dtype, search: Search, costs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scale and zero [N] of one group, rows float32 [gs, N]; `costs` float32 [gs]. See `quant.group_params`."""
    if search == "mse" and kernels_on(rows.device):
        from woq.algorithms.search_triton import LONGEST

        if len(rows) <= LONGEST:
            return _search_in_kernel(rows, bits, sym, scale_dtype, search, costs)
    return group_params(rows.t(), bits, sym, scale_dtype, search, costs)


def _search_in_kernel(
    rows: Tensor, bits: int, sym: bool, scale_dtype: torch.dtype, search: Search, costs: Tensor | None
) -> tuple[Tensor, Tensor]:
    from woq.algorithms.search_triton import best_params

    if costs is None:
        costs = torch.ones(len(rows), device=rows.device)
    factors = _factors_on(bits, sym, search, rows.device)
    return best_params(rows, costs, factors, bits, sym, scale_dtype, smallest_scale(scale_dtype))


@functools.lru_cache(maxsize=32)
def _factors_on(bits: int, sym: bool, search: Search, device: torch.device) -> Tensor:
    factors = torch.tensor(group_factors(bits, sym, search))
    if sym:
        factors = factors * (2 / ((1 << bits) - 1))
    return factors.to(device)
