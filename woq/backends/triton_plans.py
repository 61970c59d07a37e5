"""Which kernel and which tiling for which product, looked up in what was measured (triton_measured.py).

Nothing is measured at a user's first call; `python -m benchmarks.tune_triton` measures a device, for those who ask. A
device without rows of its own takes those of "NVIDIA" or, an XPU for instance, of "".
"""

from __future__ import annotations

import math
from typing import NamedTuple

from woq.backends.triton_layout import block_of
from woq.backends.triton_measured import MEASURED


class Plan(NamedTuple):
    """How a product is computed.

    decode: a program has block_m tokens and block_n outputs; parts groups of its warps share K. prefill: the same, but
    parts programs share K. dense: block_n outputs at a time are dequantized for a dense product.
    early (decode): start before the kernel before has ended, where the device can.
    """

    kernel: str  # "decode", "prefill" or "dense"
    block_m: int
    block_n: int
    parts: int
    warps: int
    stages: int
    early: bool


class Row(NamedTuple):
    """A measured plan: for up to `tokens` tokens, outputs and inputs near n and k."""

    bits: int
    tokens: int
    n: int
    k: int
    plan: Plan


ANY = 1 << 30  # tokens: no bound
LIKE = {5: 3, 6: 2, 7: 3}  # widths that were not measured are planned like one with the same block

DENSE = Plan(
    "dense", 0, 4096, 1, 4, 1, False
)  # also for float32, and groups that the other kernels cannot scale by

# Not measured: at most 64 KiB of shared memory with 4 bits, and no product narrower than 16, which is Intel's smallest.
_ANYWHERE = [
    (16, Plan("prefill", 16, 64, 8, 4, 3, False)),
    (32, Plan("prefill", 32, 64, 4, 4, 3, False)),
    (64, Plan("prefill", 64, 64, 4, 4, 3, False)),
    (128, Plan("prefill", 64, 64, 1, 4, 3, False)),
    (ANY, DENSE),
]


def _everywhere(bits: int, few: list[tuple[int, Plan]]) -> list[Row]:
    """Plans for all shapes alike: `few` for few tokens, then those above."""
    bound = few[-1][0] if few else 0
    plans = few + [(tokens, plan) for tokens, plan in _ANYWHERE if tokens > bound]
    return [Row(bits, tokens, 4096, 4096, plan) for tokens, plan in plans]


def _decode(bits: int) -> list[tuple[int, Plan]]:
    """A batched product by warps, which Intel's compiler (triton-xpu 3.3) does not get through."""
    parts = 512 // block_of(bits)
    return [(8, Plan("decode", 8, 32, parts, 4, 3, False)), (16, Plan("decode", 16, 32, parts, 4, 2, False))]


# Keys are prefixes of the device's name; the longest that fits is taken.
PLANS: dict[str, list[Row]] = {
    "": [row for bits in (2, 3, 4, 8) for row in _everywhere(bits, [])],
    "NVIDIA": [row for bits in (2, 3, 4, 8) for row in _everywhere(bits, _decode(bits))],
    **{prefix: [Row(*row[:4], Plan(*row[4:])) for row in rows] for prefix, rows in MEASURED.items()},
}


def shared_bytes(plan: Plan, bits: int) -> int:
    """Shared memory of a program, a little more than the compiler takes: its stages of x and words, or the final sum."""
    if plan.kernel == "dense":
        return 0
    block, parts = block_of(bits), plan.parts if plan.kernel == "decode" else 1
    x, words = parts * plan.block_m * block * 2, parts * plan.block_n * block * bits // 8
    stages = max(1, plan.stages - 1)
    loop = stages * (x + words) + (0 if plan.kernel == "decode" else x)
    return max(loop, parts * plan.block_m * plan.block_n * 4) + 1024


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


def fitted(plan: Plan, bits: int, limit: int) -> Plan:
    """`plan` with as many stages as `limit` bytes of shared memory allow; dense where not even one fits."""
    while shared_bytes(plan, bits) > limit:
        if plan.stages == 1:
            return DENSE
        plan = plan._replace(stages=plan.stages - 1)
    return plan
