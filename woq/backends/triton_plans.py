"""Which kernel and which tiling for which product: data, measured on devices, and the way to look it up.

Nothing is measured at a user's first call. `python -m benchmarks.tune_triton` measures a device and prints its rows.
A device without rows of its own, an XPU for instance, takes those of `""`.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from woq.backends.triton_layout import block_of


class Plan(NamedTuple):
    """How a product is computed.

    decode: a program has block_m tokens and block_n outputs; parts groups of its warps share K. prefill: the same, but
    parts programs share K. dense: block_n outputs at a time are dequantized for a dense product; the rest is unused.
    """

    kernel: Literal["decode", "prefill", "dense"]
    block_m: int
    block_n: int
    parts: int
    warps: int
    stages: int


class Row(NamedTuple):
    """A measured plan: for up to `tokens` tokens, outputs and inputs near n and k."""

    bits: int
    tokens: int
    n: int
    k: int
    plan: Plan


ANY = 1 << 30
LIKE = {5: 3, 6: 2, 7: 3}  # widths that were not measured are planned like one with the same block

_DEFAULT = [
    Row(bits, tokens, 4096, 4096, plan)
    for bits in (2, 3, 4, 8)
    for tokens, plan in (
        (8, Plan("decode", 8, 32, 512 // block_of(bits), 4, 3)),
        (16, Plan("decode", 16, 32, 512 // block_of(bits), 4, 3)),
        (32, Plan("prefill", 32, 64, 4, 4, 3)),
        (64, Plan("prefill", 64, 64, 4, 4, 3)),
        (128, Plan("prefill", 64, 64, 1, 4, 3)),
        (ANY, Plan("dense", 0, 8192, 1, 4, 1)),
    )
]

# Keys are prefixes of the device's name.
PLANS: dict[str, list[Row]] = {"": _DEFAULT}

DENSE = Plan("dense", 0, 8192, 1, 4, 1)  # for groups that the other kernels cannot scale by, and float32


def plan_for(device: str, bits: int, tokens: int, n: int, k: int) -> Plan:
    """The plan of the row that is nearest in shape among those with the smallest sufficient number of tokens."""
    rows = next(rows for prefix, rows in sorted(PLANS.items(), reverse=True) if device.startswith(prefix))
    rows = [row for row in rows if row.bits == LIKE.get(bits, bits) and row.tokens >= tokens]
    bound = min(row.tokens for row in rows)
    near = min(
        (row for row in rows if row.tokens == bound),
        key=lambda row: abs(math.log(row.n / n)) + abs(math.log(row.k / k)),
    )
    return near.plan
