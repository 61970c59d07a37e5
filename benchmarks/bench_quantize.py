"""Seconds and peak memory of quantizing one block of a Llama-3-8B shape with random weights, everything included.

    python -m benchmarks.bench_quantize --device cuda --methods gptq autoround --out blocks.csv
    python -m benchmarks.bench_quantize --device cpu --hidden 256 --intermediate 512 --samples 8 --seq-len 64 --out blocks.csv

A model of one block and one of three are quantized; half the difference is a block's time, free of what is paid once
(data, capture, compilation of kernels). The loop runs each block on the float and the quantized stream, rounds it, runs
it again on what comes next, and installs it.
"""

from __future__ import annotations

import argparse
import csv
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.quality import current_commit, machine
from woq import config_from_dict, quantize

METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"quant_method": "rtn"},
    "gptq": {"quant_method": "gptq"},
    "gptq paper": {
        "quant_method": "gptq", "search": "minmax", "act_group_aware": False, "true_sequential": False,
        "drift_correction": 0.0, "refine": 0,
    },
    "awq": {"quant_method": "awq"},
    "autoround": {"quant_method": "autoround", "iters": 200},
    "autoround rtn": {"quant_method": "autoround", "iters": 200, "init": "rtn"},
}  # fmt: skip
COLUMNS = (
    "commit", "date", "machine", "torch", "method", "hidden", "intermediate", "samples", "seq_len",
    "seconds_a_block", "seconds_once", "peak_gib",
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


def seconds_of(blocks: int, settings: dict[str, Any], options: argparse.Namespace) -> float:
    model = model_of(blocks, options)
    ids = torch.randint(
        3, 1024, (options.samples, options.seq_len), generator=torch.Generator().manual_seed(0)
    )
    config = config_from_dict({"bits": 4, "group_size": 128, **settings})
    started = time.perf_counter()
    quantize(model, config, ids, device=options.device)
    if options.device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def row_of(method: str, options: argparse.Namespace) -> dict[str, Any]:
    settings = dict(METHODS[method])
    if settings["quant_method"] != "rtn":
        settings |= {"num_samples": options.samples, "seq_len": options.seq_len}
    seconds_of(1, settings, options)  # kernels are compiled, libraries loaded
    one = seconds_of(1, settings, options)
    on_gpu = options.device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    three = seconds_of(3, settings, options)
    each = (three - one) / 2
    peak = round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None
    return {
        "method": method,
        "seconds_a_block": round(each, 3),
        "seconds_once": round(one - each, 3),
        "peak_gib": peak,
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
