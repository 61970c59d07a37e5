"""Time of every launch plan of the CUDA kernels, shape by shape: what csrc/cuda/plan.h is made from.

    python -m benchmarks.sweep_cuda --out plans.csv --tokens 16 64 256

A row's p0 .. p4 are the plan as the operator takes it: tokens, row groups, stages (0: as many as fit), split; or for decoding,
k_warps, row_warps, stages, split, row blocks; all zero is what the dispatch chose. Weights are random bits, as many layers
as exceed the L2 cache several times over; a plan is timed as in bench_linear.py, after its product has been compared with the
dequantized weight's and with itself. Prints the fastest plans.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.bench_linear import FOOTPRINT, SHAPES, microseconds
from woq import native
from woq.backends.cuda import CudaState, _register, dequantize

PREFILL = [
    (8, 2),
    (8, 4),
    (16, 2),
    (16, 4),
    (32, 2),
    (32, 4),
    (48, 2),
    (48, 4),
    (64, 2),
    (64, 4),
    (96, 2),
    (96, 3),
    (96, 4),
    (128, 2),
    (128, 3),
    (128, 4),
    (256, 2),
]  # tokens, row groups of a tile
SPLITS = (0, 1, 2, 3, 4, 5, 6, 8)
ERROR = 0.01  # of the whole product, relative: bf16 rounding gives 0.003


def random_state(n: int, k: int, bits: int, group: int, seed: int) -> CudaState:
    """A layer in the kernels' order: all bits random but the scales', which are small and positive."""
    gen = torch.Generator("cuda").manual_seed(seed)
    shape = (-(-n // 64), -(-k // 64), 128 * bits)
    weight = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device="cuda", generator=gen)
    scales = (
        torch.rand(shape[0], -(-k // group), 64, device="cuda", generator=gen) * 0.01 + 0.005
    ).bfloat16()
    return CudaState(weight, scales.view(torch.uint8), None, n, bits, group, True)


def product(state: CudaState, x: Tensor, plan: list[int]) -> Tensor:
    s = state
    y: Tensor = torch.ops.woq.cuda_linear(
        x, s.weight, s.scales, s.order, s.out_features, s.bits, s.group_size, s.scale_is_bf16, True, plan
    )
    return y


def candidates(m: int) -> list[list[int]]:
    """The table's choice (empty), then prefill plans, then decode plans; see csrc/cuda/plan.h."""
    plans: list[list[int]] = [[]]
    for tokens, groups in PREFILL:
        if m > 4 and tokens < 2 * m and tokens * 8 >= min(m, 1024):
            splits = SPLITS if m < 512 else SPLITS[:3] if m < 1024 else SPLITS[:2]
            plans += [[tokens, groups, 0, split] for split in splits]
    if m <= 16:
        for k_warps, row_warps in [(2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (2, 4)]:
            for stages in (2, 3, 4, 6, 8):
                plans += [
                    [k_warps, row_warps, stages, split, blocks]
                    for split in (1, 2, 4, 8)
                    for blocks in (0, 66, 132)
                ]
    return plans


def sweep(args: argparse.Namespace) -> None:
    native.why_not("cuda")
    _register()
    new = not args.out.exists()
    with args.out.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["gpu", "bits", "shape", "M", "p0", "p1", "p2", "p3", "p4", "us"])
        for name in args.shapes:
            n, k = SHAPES[name]
            count = max(4, int(FOOTPRINT // (n * k * args.bits / 8)))
            states = [random_state(n, k, args.bits, args.group_size, seed) for seed in range(count)]
            dense = dequantize(states[0], torch.empty(0, dtype=torch.bfloat16, device="cuda"), k)
            for m in args.tokens:
                x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
                expected = (x @ dense.T).float()
                timed: list[tuple[float, list[int]]] = []
                for plan in candidates(m) if args.plans else [[]]:
                    try:
                        y = product(states[0], x, plan).float()
                        again = product(states[0], x, plan).float()
                    except RuntimeError as error:
                        if "launch" not in str(error):  # a plan that does not fit is refused at its launch
                            raise
                        continue
                    error = ((y - expected).norm() / expected.norm()).item()
                    if not (error < ERROR and torch.equal(y, again)):
                        print(
                            f"WRONG {name} M {m} {plan}: error {error:.3g}, repeats {torch.equal(y, again)}"
                        )
                        continue
                    layers = [
                        lambda v, s=s, p=plan: product(s, v, p) for s in (states if m < 512 else states[:6])
                    ]
                    times = sorted(microseconds(layers, x, args.replays))
                    timed.append((times[len(times) // 2], plan))
                    writer.writerow(
                        [
                            torch.cuda.get_device_name(),
                            args.bits,
                            name,
                            m,
                            *([*plan, 0, 0, 0, 0, 0][:5]),
                            f"{timed[-1][0]:.2f}",
                        ]
                    )
                file.flush()
                table = timed[0][0] if timed and not timed[0][1] else float("nan")
                best = "  ".join(f"{t:.1f} {p}" for t, p in sorted(timed)[: args.show])
                print(f"{args.bits} bits {name} M {m}: table {table:.1f}; best {best}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("plans.csv"))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 16, 32, 64, 128, 256, 512, 1024])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--replays", type=int, default=7)
    parser.add_argument("--show", type=int, default=6)
    parser.add_argument("--plans", action=argparse.BooleanOptionalAction, default=True)
    sweep(parser.parse_args())


if __name__ == "__main__":
    main()
