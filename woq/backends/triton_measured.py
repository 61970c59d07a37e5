"""Measured plans: data, written by `python -m benchmarks.tune_triton --rows`. Keys are prefixes of device names.

A row: bits, tokens up to which it serves, N, K, kernel, block_m, block_n, parts, warps, stages, early (triton_plans.py).
"""

MEASURED: dict[str, list[tuple[int, int, int, int, str, int, int, int, int, int, bool]]] = {}
