"""Measure the Triton kernels' plans on this machine's GPU, and print the best as woq/backends/triton_measured.py.

    python -m benchmarks.tune_triton --compile-only          # fills Triton's cache, with all cores
    python -m benchmarks.tune_triton --out triton_plans.csv  # times, one line a plan, shape and number of tokens
    python -m benchmarks.tune_triton --rows triton_plans.csv --prefix "NVIDIA H" > woq/backends/triton_measured.py

Shapes and method are those of bench_linear.py: one CUDA graph over enough distinct layers to exceed L2 several times.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.bench_linear import SHAPES
from woq.backends import triton_measured
from woq.backends.triton_layout import TritonState, block_of
from woq.backends.triton_ops import abilities, run
from woq.backends.triton_plans import ANY, DENSE, Plan, fitted

TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
FOOTPRINT = 200e6  # bytes of packed weights: more than three times an H200's L2
FIELDS = ["device", "bits", "tokens", "n", "k", *Plan._fields, "us"]


def decode_plans(bits: int, block_m: int) -> Iterator[Plan]:
    """With blocks of 128 inputs; larger blocks have fewer parts."""
    tiles = [(16, 4, 4), (16, 8, 4), (16, 16, 4), (16, 16, 8), (32, 4, 4), (32, 8, 4), (32, 16, 4), (64, 4, 4),
             (64, 8, 4), (128, 4, 4)]  # fmt: skip
    stages = (2, 3, 4, 5) if bits == 4 else (2, 3)
    for (block_n, parts, warps), depth, early in itertools.product(tiles, stages, (False, True)):
        fewer = max(1, parts * 128 // block_of(bits))
        if fewer * block_n >= 16 * warps:  # else warps would do the same work twice
            yield Plan("decode", block_m, block_n, fewer, warps, depth, early)


def prefill_plans(bits: int, block_m: int, parts: tuple[int, ...]) -> Iterator[Plan]:
    """Tiles for wgmma: whole warp groups, a tile of 64 outputs each at least."""
    shapes, stages = ((64, 4), (128, 4), (128, 8)), (3, 4) if bits == 4 else (2, 3)
    for (block_n, warps), part, depth in itertools.product(shapes, parts, stages):
        if block_m * block_n * 2 // (32 * warps) <= 256:  # two float32 accumulators in registers
            yield Plan("prefill", block_m, block_n, part, warps, depth, False)


def candidates(bits: int, tokens: int) -> list[Plan]:
    """What is worth a measurement for so many tokens."""
    dense = [DENSE, DENSE._replace(block_n=8192)]
    if tokens <= 8:
        found = [*decode_plans(bits, 8)]
    elif tokens <= 16:
        found = [*decode_plans(bits, 16), *prefill_plans(bits, 16, (2, 4, 8))]
    elif tokens <= 64:
        found = [*prefill_plans(bits, 32 if tokens <= 32 else 64, (1, 2, 4, 8))]
    elif tokens <= 256:
        found = [*prefill_plans(bits, 64, (1, 2)), *prefill_plans(bits, 128, (1, 2, 4)), *dense]
    else:
        found = [*prefill_plans(bits, 128, (1,)), *dense]
    shared = abilities(torch.device("cuda", 0)).shared
    return [plan for plan in dict.fromkeys(found) if fitted(plan, bits, shared) == plan]


def random_state(n: int, k: int, bits: int) -> TritonState:
    """A symmetric weight with groups of 128, random to the bit."""
    block = block_of(bits)
    shape = (n // 16, -(-k // block), bits * block // 512, 16, 32)
    words = torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, device="cuda")
    scales = (torch.rand(k // 128, n, device="cuda") * 0.01).to(torch.bfloat16)
    return TritonState(words, scales, None, None, k, bits, 128)


def _compile(task: tuple[int, int, Plan]) -> None:
    bits, tokens, plan = task
    run(torch.zeros(tokens, 4096, dtype=torch.bfloat16, device="cuda"), random_state(4096, 4096, bits), plan)
    torch.cuda.synchronize()


def compile_all(tasks: list[tuple[int, int, Plan]], jobs: int) -> None:
    """Fill Triton's cache on disk: one process a core."""
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for _ in pool.imap_unordered(_compile, tasks, chunksize=2):
            pass
    print(f"{len(tasks)} compiled", flush=True)


def microseconds(states: list[TritonState], x: torch.Tensor, plan: Plan) -> float:
    """Median over replays of one graph that runs all layers, per layer."""
    run(x, states[0], plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for state in states:
            run(x, state, plan)
    times = []
    for _ in range(6):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(states))
    return sorted(times[1:])[len(times[1:]) // 2]


def measure(bits: int, tokens: list[int], writer: csv.DictWriter[str], seconds: float) -> None:
    """Every candidate on every shape; the best of each goes to the terminal."""
    began, device = time.monotonic(), torch.cuda.get_device_name()
    sums: dict[int, float] = {}
    for name, (n, k) in SHAPES.items():
        states = [random_state(n, k, bits) for _ in range(max(3, int(FOOTPRINT // (n * k * bits / 8))))]
        for m in tokens:
            x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
            best: tuple[float, Plan | None] = (float("inf"), None)
            for plan in candidates(bits, m):
                if time.monotonic() - began > seconds:
                    print("out of time", flush=True)
                    return
                us = microseconds(states, x, plan)
                best = min(best, (us, plan), key=lambda pair: pair[0])
                writer.writerow(
                    {
                        "device": device,
                        "bits": bits,
                        "tokens": m,
                        "n": n,
                        "k": k,
                        **plan._asdict(),
                        "us": f"{us:.2f}",
                    }
                )
            sums[m] = sums.get(m, 0.0) + best[0]
            print(f"{bits} bits {name:8s} {m:5d} tokens {best[0]:8.2f} us {tuple(best[1] or ())}", flush=True)
    print(f"{bits} bits, us for the four:", {m: round(us, 1) for m, us in sums.items()}, flush=True)


def print_rows(paths: list[Path], prefix: str) -> None:
    """The best plan of each width, number of tokens and shape, as the module of data."""
    best: dict[tuple[int, ...], tuple[float, tuple[object, ...]]] = {}
    for path in paths:
        with path.open() as file:
            for row in csv.DictReader(file):
                key = tuple(int(row[field]) for field in ("bits", "tokens", "n", "k"))
                tile = (int(row[field]) for field in Plan._fields[1:-1])
                found = (float(row["us"]), (row["kernel"], *tile, row["early"] == "True"))
                best[key] = min(best.get(key, found), found)
    head, _, _ = Path(triton_measured.__file__).read_text().partition("MEASURED")
    print(
        f"{head}MEASURED: dict[str, list[tuple[int, int, int, int, str, int, int, int, int, int, bool]]] = {{"
    )
    print(f'    "{prefix}": [')
    last = {bits: max(key[1] for key in best if key[0] == bits) for bits, *_ in best}
    for (bits, tokens, n, k), (_, plan) in list(best.items()):
        if (
            tokens == last[bits]
        ):  # the largest number measured serves all above, a fused kernel four times as many
            if plan[0] != DENSE.kernel:
                best[bits, 4 * tokens, n, k] = best.pop((bits, tokens, n, k))
            best[bits, ANY, n, k] = (0.0, DENSE)
    for (bits, tokens, n, k), (_, plan) in sorted(best.items()):
        print(f"        {(bits, tokens, n, k, *plan)},".replace("'", '"'))
    print("    ],\n}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--bits", nargs="+", type=int, default=[4])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--out", type=Path, default=Path("triton_plans.csv"))
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop measuring a width after so long"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--prefix", default="", help="with --rows: the devices' names begin so")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument(
        "--rows", nargs="+", type=Path, help="print the best rows of these files and measure nothing"
    )
    args = parser.parse_args()
    if args.rows:
        print_rows(args.rows, args.prefix)
        return
    tasks = [
        (bits, m, plan) for bits in args.bits for m in args.tokens for plan in candidates(bits, m, args.early)
    ]
    if args.compile_only:
        compile_all(tasks, args.jobs)
        return
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for bits in args.bits:
            measure(bits, args.tokens, writer, args.seconds)


if __name__ == "__main__":
    main()
