"""Time of one quantized linear, kernel by kernel, on one GPU: ours, cuBLAS, and the peers that are installed.

    python -m benchmarks.bench_linear --out benchmarks/results/linear_h200.csv
    python -m benchmarks.bench_linear --plot benchmarks/results/linear_h200.csv

Every implementation gets the same random weights for R distinct layers, R large enough that the packed weights exceed the
L2 cache several times over; one CUDA graph runs the R layers in turn; a replay's time over R is one sample. The shapes
are the four linears of Llama-3-8B (qkv and gate_up fused). One row a measurement, long format.
"""

from __future__ import annotations

import argparse
import csv
import datetime
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import current_commit, random_weight
from woq.backends.base import Backend, Target
from woq.backends.cuda import CudaBackend
from woq.backends.triton import TritonBackend
from woq.weights import QuantizedWeight, WeightSpec

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}  # out, in
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
FIELDS = [
    "commit",
    "date",
    "gpu",
    "torch",
    "backend",
    "M",
    "N",
    "K",
    "bits",
    "group_size",
    "sym",
    "desc_act",
    "dtype",
    "metric",
    "unit",
    "p20",
    "p50",
    "p80",
]
FOOTPRINT = 400e6  # bytes of packed weights that a graph runs through: six times an H200's L2
Linear = Callable[[Tensor], Tensor]


def ours(backend: Backend[Any], weight: QuantizedWeight, dtype: torch.dtype) -> Linear:
    """One of the package's own backends."""
    target = Target(torch.device("cuda"), dtype)
    reason = backend.why_not(weight.spec, target)
    if reason is not None:
        raise NotImplementedError(reason)
    state = backend.prepare(weight.pack(), target)
    return lambda x: backend.apply(x, state)


def cuda(weight: QuantizedWeight, dtype: torch.dtype) -> Linear:
    return ours(CudaBackend(), weight, dtype)


def triton(weight: QuantizedWeight, dtype: torch.dtype) -> Linear:
    return ours(TritonBackend(), weight, dtype)


def cublas(weight: QuantizedWeight, dtype: torch.dtype) -> Linear:
    """The dense weight: what quantization has to beat."""
    dense = weight.dequantize(dtype)
    return lambda x: torch.nn.functional.linear(x, dense)


def tinygemm(weight: QuantizedWeight, dtype: torch.dtype) -> Linear:
    """torch.ops.aten._weight_int4pack_mm, which torchao, quanto and hqq call."""
    spec = weight.spec
    if spec.bits != 4 or dtype != torch.bfloat16 or spec.desc_act:
        raise NotImplementedError("4 bits, bf16, no activation order")
    codes = (weight.codes[:, ::2] << 4 | weight.codes[:, 1::2]).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = weight.scales.bfloat16().t()
    shift = ((8 - weight.zeros.float()) * weight.scales.float()).bfloat16().t()
    table = torch.stack([scales, shift], -1).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, spec.group_size, table)


def gemlite(weight: QuantizedWeight, dtype: torch.dtype) -> Linear:
    from gemlite import DType, GemLiteLinear  # type: ignore[import-not-found]

    spec = weight.spec
    kind = {torch.bfloat16: DType.BF16, torch.float16: DType.FP16}[dtype]
    layer = GemLiteLinear(
        spec.bits,
        group_size=spec.group_size,
        in_features=spec.in_features,
        out_features=spec.out_features,
        input_dtype=kind,
        output_dtype=kind,
    )
    zeros = weight.zeros.to(dtype).reshape(-1, 1)
    layer.pack(weight.codes, weight.scales.to(dtype).reshape(-1, 1), zeros, None)
    return lambda x: layer(x)


def humming(weight: QuantizedWeight, dtype: torch.dtype) -> Linear:
    from humming.layer import HummingLayer  # type: ignore[import-not-found]

    spec = weight.spec
    config = {
        "quant_method": "gptq",
        "bits": spec.bits,
        "group_size": spec.group_size,
        "sym": spec.sym,
        "desc_act": False,
    }
    layer = HummingLayer(
        shape_n=spec.out_features, shape_k=spec.in_features, weight_config=config, torch_dtype=dtype
    ).cuda()
    layer.load_from_tensors(weight.pack().tensors())
    layer.transform()
    return lambda x: layer(x)


BACKENDS = {f.__name__: f for f in (cublas, cuda, triton, tinygemm, humming, gemlite)}


def microseconds(layers: list[Linear], x: Tensor, replays: int) -> list[float]:
    """Time per layer of each replay of one graph over all layers."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # warm up where allocations and lazy initialisation do no harm
        for layer in layers[:2]:
            layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            layer(x)
    samples = []
    for replay in range(replays + 2):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        if replay >= 2:
            samples.append(start.elapsed_time(stop) * 1e3 / len(layers))
    return samples


def check(layer: Linear, x: Tensor, weight: QuantizedWeight) -> None:
    """A fast wrong kernel is no result."""
    expected = x.float() @ weight.dequantize().T
    error = ((layer(x).float() - expected).norm() / expected.norm()).item()
    if not error < 0.02:
        raise ArithmeticError(f"relative error {error:.3g}")


def measure(
    name: str, spec: WeightSpec, dtype: torch.dtype, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """All rows of one backend and one weight."""
    n, k = spec.out_features, spec.in_features
    packed = n * k * (spec.bits / 8 if name != "cublas" else 2)
    count = max(4, int(FOOTPRINT // packed))
    layers = []
    for seed in range(count):
        weight = random_weight(spec, seed, "cuda")
        layers.append(BACKENDS[name](weight, dtype))
        if seed == 0:
            check(layers[0], torch.randn(4, k, dtype=dtype, device="cuda"), weight)
    stored = n * k * spec.bits / 8 + n * spec.groups * (2 + (0 if spec.sym else 1))
    for m in args.tokens:
        if name == "tinygemm" and m > 1024:  # minutes, to show what 1024 shows
            continue
        x = torch.randn(m, k, dtype=dtype, device="cuda")
        used = layers if m < 256 else layers[:4]
        times = sorted(microseconds(used, x, args.replays if m < 512 else max(4, args.replays // 4)))
        p20, p50, p80 = (times[int(q * (len(times) - 1))] for q in (0.2, 0.5, 0.8))
        bytes_moved = (n * k * 2 if name == "cublas" else stored) + 2 * m * (n + k)
        rates = [
            ("time", "us", p20, p50, p80),
            ("bandwidth", "GB/s", *(bytes_moved / t / 1e3 for t in (p20, p50, p80))),
        ]
        rates.append(("compute", "TFLOP/s", *(2 * m * n * k / t / 1e6 for t in (p20, p50, p80))))
        for metric, unit, a, b, c in rates:
            yield {
                "M": m,
                "metric": metric,
                "unit": unit,
                "p20": f"{a:.4g}",
                "p50": f"{b:.4g}",
                "p80": f"{c:.4g}",
            }


def run(args: argparse.Namespace) -> None:
    commit = args.commit or current_commit()
    dtype = getattr(torch, args.dtype)
    constant = {
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "bits": args.bits,
        "group_size": args.group_size,
        "sym": not args.asym,
        "desc_act": args.desc_act,
        "dtype": args.dtype,
    }
    new = not args.out.exists()
    with args.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        for name in args.backends:
            sums: dict[int, float] = {}
            for shape, (n, k) in SHAPES.items():
                spec = WeightSpec(
                    k, n, args.bits, args.group_size, not args.asym, args.desc_act, scale_dtype=dtype
                )
                try:
                    rows = list(measure(name, spec, dtype, args))
                except (ImportError, NotImplementedError, ArithmeticError, RuntimeError, OSError) as error:
                    print(f"{name} {shape}: left out: {str(error)[:200]}", flush=True)
                    continue
                for row in rows:
                    writer.writerow({**constant, "backend": name, "N": n, "K": k, **row})
                    if row["metric"] == "time":
                        sums[row["M"]] = sums.get(row["M"], 0.0) + float(row["p50"])
                file.flush()
                torch.cuda.empty_cache()
            print(
                f"{name} {args.bits} bits, us for the four:",
                {m: round(t, 1) for m, t in sums.items()},
                flush=True,
            )


def plot(path: Path) -> None:
    """Time of the four linears over tokens, one line a backend: 4 bits, symmetric, as in the tables of docs/cuda.md."""
    from matplotlib import pyplot

    times: dict[str, dict[int, list[float]]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            if (row["metric"], row["bits"], row["sym"], row["desc_act"]) == ("time", "4", "True", "False"):
                times.setdefault(row["backend"], {}).setdefault(int(row["M"]), []).append(float(row["p50"]))
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for backend, by_tokens in times.items():
        whole = {m: sum(t) for m, t in sorted(by_tokens.items()) if len(t) == len(SHAPES)}
        axes.plot(list(whole), list(whole.values()), marker="o", markersize=3, label=backend)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="us, four linears of Llama-3-8B")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/linear.csv"))
    parser.add_argument("--plot", type=Path, help="draw this CSV and measure nothing")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=list(BACKENDS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--desc-act", action="store_true")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--commit", help="recorded in the CSV; by default asked of git")
    args = parser.parse_args()
    if args.plot:
        plot(args.plot)
    else:
        run(args)


if __name__ == "__main__":
    main()
