"""Seconds and peak memory of quantizing one block of a Llama-3-8B shape with random weights, everything included.

    python -m benchmarks.bench_quantize --device cuda --methods gptq autoround --out blocks.csv
    python -m benchmarks.bench_quantize --device cpu --hidden 256 --intermediate 512 --samples 8 --seq-len 64 --out blocks.csv

The median over all blocks but the first, which pays for what is paid once (kernels are compiled, libraries loaded).
The split by phase comes from a second run that waits for the device at every phase's border: its sum is a little more.
"forward" is the blocks' runs on both streams, "statistics" the moments, "search" the groups' grids, "round" the
column loop without it, "scales" and "descent" what refines it.
"""

from __future__ import annotations

import argparse
import csv
import time
from contextlib import nullcontext
from datetime import date
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.quality import current_commit, machine
from woq import config_from_dict, quantize
from woq.phases import measured
from woq.progress import Progress

METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"quant_method": "rtn"},
    "gptq": {"quant_method": "gptq"},
    "gptq paper": {
        "quant_method": "gptq", "search": "minmax", "act_group_aware": False, "true_sequential": False,
        "drift_correction": 0.0, "refine": 0,
    },
    "awq": {"quant_method": "awq"},
    "autoround": {"quant_method": "autoround", "iters": 200},
    "autoround compiled": {"quant_method": "autoround", "iters": 200, "compile": True},
    "autoround rtn": {"quant_method": "autoround", "iters": 200, "init": "rtn"},
}  # fmt: skip
COLUMNS = (
    "commit", "date", "machine", "torch", "method", "hidden", "intermediate", "samples", "seq_len",
    "seconds_a_block", "blocks", "seconds_once", "peak_gib", "phases",
)  # fmt: skip


def model_of(blocks: int, options: argparse.Namespace) -> Any:
    heads = max(options.hidden // 128, 2)
    config = LlamaConfig(
        hidden_size=options.hidden, intermediate_size=options.intermediate, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=max(heads // 4, 1), vocab_size=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    dtype = torch.bfloat16 if options.device != "cpu" else torch.float32
    with torch.device(options.device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


class BlockClock(Progress):
    """Seconds at which each block was done, and what each phase had come to by then."""

    def __init__(self, device: torch.device, phases: dict[str, float]) -> None:
        self.device, self.phases = device, phases
        self.at_ends: list[tuple[float, dict[str, float]]] = []

    def step(self, detail: str = "") -> None:  # noqa: ARG002 - as `Progress` has it
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        self.at_ends.append((time.perf_counter(), dict(self.phases)))


def run(settings: dict[str, Any], options: argparse.Namespace, split: bool) -> tuple[float, BlockClock]:
    """Quantize `options.blocks` blocks: when that began, and the clock that saw them."""
    model = model_of(options.blocks, options)
    ids = torch.randint(
        3, 1024, (options.samples, options.seq_len), generator=torch.Generator().manual_seed(0)
    )
    config = config_from_dict({"bits": 4, "group_size": 128, **settings})
    device = torch.device(options.device)
    with measured(device) if split else nullcontext({}) as phases:
        clock = BlockClock(device, phases)
        started = time.perf_counter()
        quantize(model, config, ids, device=options.device, progress=clock)
    return started, clock


def row_of(method: str, options: argparse.Namespace) -> dict[str, Any]:
    settings = dict(METHODS[method])
    if settings["quant_method"] != "rtn":
        settings |= {"num_samples": options.samples, "seq_len": options.seq_len}
    on_gpu = options.device.startswith("cuda")
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started, clock = run(settings, options, split=False)
    ends = [at for at, _ in clock.at_ends]
    each = [end - begin for begin, end in pairwise(ends)]
    peak = round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None
    _, split = run(settings, options, split=True)
    (_, first), (_, last) = split.at_ends[0], split.at_ends[-1]
    phases = {name: (last[name] - first.get(name, 0.0)) / len(each) for name in last}
    ordered = sorted(phases.items(), key=lambda item: -item[1])
    return {
        "method": method,
        "seconds_a_block": round(median(each), 3),
        "blocks": len(each),
        "seconds_once": round(ends[0] - started - median(each), 3),
        "peak_gib": peak,
        "phases": " ".join(f"{name.replace(' ', '_')}={seconds:.3f}" for name, seconds in ordered),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=3, help="at least 2; the first is not counted")
    parser.add_argument("--commit", help="what to write in the CSV where there is no git checkout")
    parser.add_argument("--out", type=Path, required=True, help="CSV to write")
    options = parser.parse_args()
    same = {
        "commit": options.commit or current_commit(), "date": date.today().isoformat(),
        "machine": machine(options.device), "torch": torch.__version__, "hidden": options.hidden,
        "intermediate": options.intermediate, "samples": options.samples, "seq_len": options.seq_len,
    }  # fmt: skip
    with options.out.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, COLUMNS)
        writer.writeheader()
        for method in options.methods:
            row = row_of(method, options)
            writer.writerow({**same, **row})
            handle.flush()
            print(row, flush=True)


if __name__ == "__main__":
    main()
