"""Perplexity and KL divergence of every algorithm at 4, 3 and 2 bits, in the fixed protocol: one CSV row a setting.

    python benchmarks/quality.py --data ../shared/data --model stories15M
    python benchmarks/quality.py --data ../shared/data --model smollm2-135m --folder /path/to/SmolLM2-135M-Instruct

The protocol: fixed calibration and test windows (data/quality/<model>.safetensors, tensors "calib" and "test"), all
linears but the head, group 32 (stories15M) or 64 (SmolLM2), float32 evaluation of the dequantized weights, so that
only the quantization is judged. Seconds are those of quantizing, calibration included.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from woq import QuantConfig, config_from_dict, quantize
from woq.evaluation import compare, perplexity
from woq.linear import QuantLinear

GROUP = {"stories15M": 32, "smollm2-135m": 64}
PAPER: dict[str, Any] = {"search": "minmax", "act_group_aware": False, "true_sequential": False}
PLAIN: dict[str, Any] = {"quant_method": "gptq", "drift_correction": 0.0, "refine": 0}
OWN: dict[str, Any] = {"own_samples": 256}
LONG: dict[str, Any] = {"own_samples": 768, "iters": 1000, "lookahead": 1}
METHODS: dict[str, dict[str, Any]] = {
    "RTN minmax": {"quant_method": "rtn", "search": "minmax"},
    "RTN": {"quant_method": "rtn"},
    "AWQ": {"quant_method": "awq"},
    "TEQ": {"quant_method": "teq"},
    "GPTQ paper": {**PLAIN, **PAPER},
    "GPTQ": {"quant_method": "gptq"},
    "GPTQ, end to end": {"quant_method": "gptq", "distill_iters": 200},
    "AutoRound paper": {
        "quant_method": "autoround", "init": "rtn", "optimizer": "signsgd", "drift_correction": 1.0,
    },
    "AutoRound": {"quant_method": "autoround"},
    "AutoRound, end to end": {"quant_method": "autoround", "distill_iters": 200},
    # Beside the protocol's calibration windows, text that the model writes, half of it going on with some tokens of them.
    "GPTQ, own text": {"quant_method": "gptq", **OWN},
    "AutoRound, own text": {"quant_method": "autoround", **OWN, "lookahead": 1},
    "AutoRound, own text, end to end": {
        "quant_method": "autoround", **OWN, "lookahead": 1, "distill_iters": 300,
    },
    "AutoRound, long": {"quant_method": "autoround", **LONG},
    "AutoRound, long, end to end": {"quant_method": "autoround", **LONG, "distill_iters": 400},
}  # fmt: skip
# GPTQ's parts, each alone on the paper's and all but each: docs/algorithms.md has the table.
ABLATION: dict[str, dict[str, Any]] = {
    "paper": {**PLAIN, **PAPER},
    "paper + mse grid": {**PLAIN, **PAPER, "search": "mse"},
    "paper + activation grid": {**PLAIN, **PAPER, "search": "activation"},
    "paper + group-aware order": {**PLAIN, **PAPER, "act_group_aware": True},
    "paper + true sequential": {**PLAIN, **PAPER, "true_sequential": True},
    "paper + drift correction": {**PLAIN, **PAPER, "drift_correction": 0.5},
    "paper + both": {**PLAIN, **PAPER, "true_sequential": True, "drift_correction": 0.75},
    "paper + refine": {**PLAIN, **PAPER, "refine": 2},
    "all": {"quant_method": "gptq"},
    "all - activation grid": {"quant_method": "gptq", "search": "minmax"},
    "all - group-aware order": {"quant_method": "gptq", "act_group_aware": False},
    "all - true sequential": {"quant_method": "gptq", "true_sequential": False, "drift_correction": 0.5},
    "all - drift correction": {"quant_method": "gptq", "drift_correction": 0.0},
    "all - refine": {"quant_method": "gptq", "refine": 0},
    "all, desc_act": {"quant_method": "gptq", "desc_act": True},
}
CHOICES = {**METHODS, **ABLATION}
COLUMNS = (
    "commit", "date", "machine", "torch", "model", "method", "sym", "bits", "group_size", "samples", "windows",
    "seed", "perplexity", "kl", "top1", "seconds",
)  # fmt: skip


def dequantized(model: nn.Module, device: str = "cpu") -> nn.Module:
    """`model` with every `QuantLinear` replaced by a float linear of the same weight: the quantization alone."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            linear = nn.Linear(
                module.in_features, module.out_features, bias=module.bias is not None, device="meta"
            )
            weight = module.packed.to(device).unpack().dequantize()
            linear.weight = nn.Parameter(weight, requires_grad=False)
            linear.bias = module.bias
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, linear)
    return model


def measure(
    model: nn.Module, config: QuantConfig, calib: Tensor, test: Tensor, device: str
) -> dict[str, Any]:
    """Quantize a copy of `model` and compare it with the original."""
    work = copy.deepcopy(model)
    started = time.perf_counter()
    quantize(work, config, calib, device=device)
    seconds = time.perf_counter() - started
    result = compare(dequantized(work, device), model, test, batch_size=16)
    return {
        "perplexity": round(result.perplexity.value, 4),
        "kl": round(result.kl, 5),
        "top1": round(result.top1_agreement, 4),
        "seconds": round(seconds, 1),
    }


def current_commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def machine(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def width(text: str) -> int | str:
    """A number of bits, or an average as configs take it."""
    return text if text.startswith("auto:") else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with models/ and quality/")
    parser.add_argument("--model", choices=GROUP, required=True)
    parser.add_argument("--folder", type=Path, help="the float checkpoint; default: DATA/models/MODEL")
    parser.add_argument("--bits", type=width, nargs="+", default=[4, 3, 2], help="or auto:3.5")
    parser.add_argument("--methods", nargs="+", choices=CHOICES, default=list(METHODS))
    parser.add_argument("--sym", choices=["sym", "asym"], nargs="+", default=["sym", "asym"])
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[42], help="for methods that draw random numbers"
    )
    parser.add_argument(
        "--samples", type=int, help="calibration windows to use; default: all, as the protocol says"
    )
    parser.add_argument("--windows", type=int, help="test windows to use; default: all, as the protocol says")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--commit", help="what to write in the CSV where there is no git checkout")
    parser.add_argument(
        "--out", type=Path, help="CSV to add rows to; default: benchmarks/results/quality-MODEL.csv"
    )
    options = parser.parse_args()

    tokens = load_file(options.data / "quality" / f"{options.model}.safetensors")
    calib, test = tokens["calib"].long()[: options.samples], tokens["test"].long()[: options.windows]
    folder = options.folder or options.data / "models" / options.model
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = model.eval().requires_grad_(False).to(options.device)
    same = {
        "commit": options.commit or current_commit(),
        "date": date.today().isoformat(),
        "machine": machine(options.device),
        "torch": torch.__version__,
        "model": options.model,
        "samples": len(calib),
        "windows": len(test),
        "group_size": GROUP[options.model],
    }
    out = options.out or Path(__file__).parent / "results" / f"quality-{options.model}.csv"
    rows = []
    new = not out.exists()
    with out.open("a", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, COLUMNS)
        if new:
            writer.writeheader()

        def add(told: str, row: dict[str, Any]) -> None:
            writer.writerow({**same, **row})
            handle.flush()  # a run takes hours: what is measured stays
            rows.append({**same, **row})
            print(told, {k: row[k] for k in ("perplexity", "kl", "seconds") if k in row}, flush=True)

        plain = perplexity(model, test, batch_size=16).value
        add("float", {"method": "float", "perplexity": round(plain, 4)})
        for told, labels, config in settings_of(options, calib.shape[1]):
            add(told, {**labels, **measure(model, config, calib, test, options.device)})
    plot(rows, out.with_suffix(".png"))


def settings_of(
    options: argparse.Namespace, seq_len: int
) -> Iterator[tuple[str, dict[str, Any], QuantConfig]]:
    """Every row to measure: what to print of it, its labels in the CSV, its config."""
    for bits, method, kind in itertools.product(options.bits, options.methods, options.sym):
        settings = {**CHOICES[method], "bits": bits, "sym": kind == "sym", "group_size": GROUP[options.model]}
        labels = {"method": method, "sym": kind == "sym", "bits": bits}
        if settings["quant_method"] == "rtn":
            yield f"{method} {kind} W{bits}", labels, config_from_dict(settings)
            continue
        drawn = settings["quant_method"] in ("autoround", "teq") or "distill_iters" in settings
        for seed in options.seeds if drawn else options.seeds[:1]:
            config = config_from_dict({**settings, "seq_len": seq_len, "seed": seed})
            yield f"{method} {kind} W{bits} seed {seed}", {**labels, "seed": seed}, config


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """KL divergence by width, a line a method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        if "kl" in row:
            label = f"{row['method']} {'sym' if row['sym'] else 'asym'}"
            lines.setdefault(label, []).append((str(row["bits"]), float(row["kl"])))
    for label, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(yscale="log", xlabel="bits", ylabel="KL(float || quantized), nats a token")
    axes.set_title(f"{rows[0]['model']}, group {rows[0]['group_size']}, {rows[0]['windows']} test windows")
    axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
