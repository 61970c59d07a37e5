"""Time of one quantized linear on the CPU: our backend, dense matrices, and the peers that are installed.

    make bench-cpu                                              # makes .venv-bench with the peers, then this
    python -m benchmarks.bench_linear_cpu --out linear.csv      # whoever is installed
    python -m benchmarks.cpu_tables linear.csv                  # as tables and a plot

The protocol. One process for each number of threads and each weight; in it every implementation gets the same random
layers, as many as are needed to exceed --footprint several caches over, with different data each. A round lets every
implementation run in turn for a slice of time, each call on the next layer; rounds repeat, so that what drifts (clock,
neighbours) hits all alike. Before an implementation's turn the process has to have come to rest: thread pools that still
spin would slow it down. A sample is one call; the median over all rounds counts. Every implementation is first checked
against the float32 product, and one that errs is left out, as are those that are not installed; both are listed with
their reasons. One row a measurement, long format.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Absent, Call, Layer, cpu_name, current_commit, quantiles, random_weight
from benchmarks.cpu_ggml import libraries
from benchmarks.cpu_peers import Peer, peers, start_onnxruntime
from woq.weights import QuantizedWeight, WeightSpec

SHAPES = ("4096x4096", "4096x14336")  # in, out
TOKENS = (1, 4, 16, 128, 512)
MANY = 128  # tokens
FIELDS = [
    "commit", "date", "cpu", "isa", "threads", "backend", "activations", "package",
    "version", "torch", "python", "M", "N", "K",
    "bits", "group_size", "sym", "metric", "unit", "p20", "p50", "p80",
]  # fmt: skip
WIDTHS = ("4", "2", "3", "8", "4-asym")  # the first with all peers, the others for our own rows
ALLOWED = {"exact": 0.01, "int8": 0.03}  # relative error of the product; bf16 alone brings about 0.003
REFUSALS = (Absent, ImportError, NotImplementedError, ArithmeticError, RuntimeError, ValueError, OSError)


def spec_of(width: str, shape: str, group_size: int) -> WeightSpec:
    """For example "4-asym" and "4096x14336"."""
    bits, _, asym = width.partition("-")
    k, n = map(int, shape.split("x"))
    return WeightSpec(k, n, int(bits), group_size, sym=not asym, scale_dtype=torch.bfloat16)


@functools.cache
def example(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Activations and their product, in float32."""
    x = torch.randn(5, weight.spec.in_features, generator=torch.Generator().manual_seed(1))
    return x, x @ weight.dequantize().T


def checked(peer: Peer, weight: QuantizedWeight) -> tuple[Layer, float]:
    """The peer's layer and the relative error of its product. Raises ArithmeticError where that is too large."""
    layer, own = peer.make(weight)
    x, expected = example(weight)
    if own is not None:
        expected = x @ own.T
    call = layer(x)
    error = ((call().float() - expected).norm() / expected.norm()).item()
    if not error < ALLOWED[peer.activations]:
        raise ArithmeticError(f"relative error {error:.3g}")
    return layer, error


def rest(seconds: float = 0.2) -> None:
    """Wait until no thread of this process spins any more, or `seconds` have passed."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        before, used = time.perf_counter(), time.process_time()
        time.sleep(0.004)
        if time.process_time() - used < 0.1 * (time.perf_counter() - before):
            return


class Turns:
    """One implementation's calls on all its layers, and the samples so far."""

    def __init__(self, layers: list[Layer], x: Tensor) -> None:
        """Calls every layer once: some compile or rearrange at their first call of a shape."""
        used = (
            layers if x.shape[0] < MANY else layers[:4]
        )  # from there on arithmetic takes the time, not reading
        self.calls: list[Call] = [layer(x) for layer in used]
        self.next = 0
        self.samples: list[float] = []
        for call in self.calls:
            call()

    def turn(self, seconds: float) -> None:
        """Calls for `seconds`, at least one, after one or two that wake the threads up. What takes long is told by four."""
        if len(self.samples) >= 4 and min(self.samples) > 1e5:
            return
        rest()
        began = time.perf_counter()
        self._once()
        if time.perf_counter() - began < seconds / 4:
            self._once()
        end = time.perf_counter() + seconds
        while True:
            self.samples.append(self._once())
            if time.perf_counter() >= end:
                return

    def _once(self) -> float:
        """Microseconds of a call on the next layer."""
        call = self.calls[self.next % len(self.calls)]
        self.next += 1
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * 1e6


def build(peer: Peer, weights: list[QuantizedWeight], footprint: float) -> tuple[list[Layer], float]:
    """Layers whose weights together exceed `footprint` bytes, the first and the last checked, and the larger error."""
    spec = weights[0].spec
    size = spec.out_features * spec.in_features * (peer.bits or spec.bits) / 8
    count = max(2, min(len(weights), int(footprint // size) + 1))
    first, error = checked(peer, weights[0])
    last, other = checked(peer, weights[count - 1])
    return [first, *(peer.make(weight)[0] for weight in weights[1 : count - 1]), last], max(error, other)


def worker(args: argparse.Namespace) -> None:
    """All rows of one weight and one number of threads, appended to the CSV as they come: a peer's crash ends the process."""
    (threads,), (width,), (shape,) = args.threads, args.widths, args.shapes
    torch.set_num_threads(threads)
    spec = spec_of(width, shape, args.group_size)
    count = int(args.footprint // (spec.out_features * spec.in_features * spec.bits / 8)) + 1
    weights = [random_weight(spec, seed, "cpu") for seed in range(count)]
    built: dict[Peer, list[Layer]] = {}
    for peer in chosen(args, threads, width):
        print(f"  {peer.name}", flush=True)
        try:
            if peer.package == "onnxruntime" and not any(p.package == "onnxruntime" for p in built):
                start_onnxruntime(threads)
            built[peer], error = build(peer, weights, args.footprint)
        except REFUSALS as reason:
            print(f"  left out: {peer.name}: {str(reason).splitlines()[0][:200]}", flush=True)
            continue
        write(args.out, [row(args, peer, spec, 5, "error", "relative", (error,) * 3)])
    for m in args.tokens:
        x = torch.randn(m, spec.in_features, generator=torch.Generator().manual_seed(m))
        turns = {peer: Turns(layers, x) for peer, layers in built.items()}
        for _ in range(args.rounds):
            for its in turns.values():
                its.turn(args.slice)
        write(
            args.out,
            [row(args, peer, spec, m, "time", "us", quantiles(its.samples)) for peer, its in turns.items()],
        )
        said = sorted((quantiles(its.samples)[1], peer.name) for peer, its in turns.items())
        print(f"  M={m}: " + "  ".join(f"{name} {us:.0f}" for us, name in said), flush=True)


def chosen(args: argparse.Namespace, threads: int, width: str) -> list[Peer]:
    """Our rows for every width; the peers' for the first."""
    listed = [p for p in peers(threads, args.ggml) if args.backends is None or p.name in args.backends]
    return listed if width == WIDTHS[0] else [p for p in listed if p.package == "woq"]


def row(
    args: argparse.Namespace,
    peer: Peer,
    spec: WeightSpec,
    m: int,
    metric: str,
    unit: str,
    values: tuple[float, ...],
) -> dict[str, Any]:
    cpu, isa = cpu_name()
    return {
        "commit": args.commit,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": cpu,
        "isa": isa,
        "threads": args.threads[0],
        "backend": peer.name,
        "activations": peer.activations,
        "package": peer.package,
        "version": peer.version,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "M": m,
        "N": spec.out_features,
        "K": spec.in_features,
        "bits": int(peer.bits or spec.bits),
        "group_size": spec.group_size,
        "sym": spec.sym,
        "metric": metric,
        "unit": unit,
        **{name: f"{value:.4g}" for name, value in zip(("p20", "p50", "p80"), values, strict=True)},
    }


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def spawn(args: argparse.Namespace) -> None:
    """A process for each number of threads and weight: pools are made once a process, and a crash costs one of them."""
    for threads in args.threads:
        for shape in args.shapes:
            for width in args.widths:
                print(f"{threads} threads, {shape}, {width} bits", flush=True)
                own = ["--worker", "--threads", str(threads), "--shapes", shape, "--widths", width]
                command = [sys.executable, "-m", "benchmarks.bench_linear_cpu", *passed_on(args), *own]
                environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}  # noqa: TID251
                status = subprocess.run(command, env=environment, check=False).returncode
                if status:
                    print(f"  failed with status {status}", flush=True)


def passed_on(args: argparse.Namespace) -> list[str]:
    """What every worker is told."""
    flags = [
        "--out",
        args.out,
        "--commit",
        args.commit,
        "--group-size",
        args.group_size,
        "--rounds",
        args.rounds,
    ]
    flags += ["--slice", args.slice, "--footprint", args.footprint, "--tokens", *args.tokens]
    if args.ggml:
        flags += ["--ggml", args.ggml]
    if args.backends:
        flags += ["--backends", *args.backends]
    return [str(flag) for flag in flags]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/linear_cpu.csv"))
    parser.add_argument("--threads", nargs="+", type=int, default=[2, 1])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="inputs x outputs")
    parser.add_argument("--widths", nargs="+", default=list(WIDTHS), choices=WIDTHS)
    parser.add_argument("--backends", nargs="+", help="names as in the CSV; default: all")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--slice", type=float, default=0.03, help="seconds of a turn")
    parser.add_argument(
        "--footprint", type=float, default=140e6, help="bytes of weights that calls rotate over"
    )
    parser.add_argument(
        "--ggml", type=Path, default=libraries(None), help="folder of llama.cpp's shared libraries"
    )
    parser.add_argument("--commit", help="recorded in the CSV; by default asked of git")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.commit = args.commit or current_commit()
    (worker if args.worker else spawn)(args)


if __name__ == "__main__":
    main()
