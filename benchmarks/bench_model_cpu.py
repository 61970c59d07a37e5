"""Tokens a second of whole models on the CPU through `generate`: ours, transformers' float model, and llama.cpp, in one run.

    python /path/to/get_smollm2.py SmolLM2-135M-Instruct
    python -m benchmarks.bench_model_cpu --model SmolLM2-135M-Instruct --group-size 64
    python -m benchmarks.bench_model_cpu --model random-1.1b --llama-bench /path/to/llama.cpp/build/bin/llama-bench

The float folder (or a Llama of TinyLlama's shape with random weights) is quantized to nearest, 4 bits, symmetric, into a
folder of ours, which is loaded once for each way to compute; llama.cpp gets the GGUF file that `woq convert` makes of it.
All are held in memory and take turns, round after round. Prefill: the time of `generate` from its start to the first of its
tokens, after --prompt tokens. Decoding: the time of --new further tokens. llama.cpp's are those of llama-bench at the same depth. At the end: where
the time of our model goes, and what a call of a quantized layer costs besides its kernel.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM as Plain
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

from benchmarks.common import cpu_name, current_commit, quantiles, random_weight
from woq import AutoModelForCausalLM, RtnConfig, fuse_shared_inputs, quantize_folder
from woq.backends.base import Target
from woq.interop.convert import convert
from woq.linear import QuantLinear
from woq.weights import WeightSpec

FIELDS = [
    "commit", "date", "cpu", "isa", "threads", "torch", "model", "group_size", "variant", "metric", "unit", "p20", "p50",
    "p80",
]  # fmt: skip
Rates = dict[str, list[float]]  # "prefill" and "decode": tokens a second
OURS: dict[str, dict[str, Any]] = {
    "woq bf16": {"dtype": "bfloat16"},
    "woq fp32": {"dtype": "float32"},
    "woq bf16 int8": {"dtype": "bfloat16", "compute_dtype": "int8"},
    "woq fp32 int8": {"dtype": "float32", "compute_dtype": "int8"},
}
# The output head in 8 bits too, and linears that share an input as one product.
ALL_PACKED = {"woq fp32, head, fused": OURS["woq fp32"], "woq fp32 int8, head, fused": OURS["woq fp32 int8"]}
PLAIN = {"transformers bf16": torch.bfloat16, "transformers fp32": torch.float32}


def random_llama(folder: Path) -> None:
    """TinyLlama's shape, 1.1 billion parameters, weights of its initialisation, in bfloat16."""
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=32000, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


class Clock(StoppingCriteria):  # type: ignore[misc]
    """Stops nothing: notes when each token is there."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@torch.inference_mode()
def generate(model: Any, ids: Tensor, new: int) -> list[float]:
    """Exactly `new` tokens, greedily: seconds at the start and when each of them was there."""
    clock = Clock()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return clock.times


def rates(model: Any, prompt: int, new: int) -> tuple[float, float]:
    """Tokens a second of prefill (up to the first new token) and of decoding (`new` more)."""
    ids = torch.randint(3, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    start, first, *_, last = generate(model, ids, 1 + new)
    return prompt / (first - start), new / (last - first)


def llama_rates(program: Path, file: Path, args: argparse.Namespace) -> tuple[float, float]:
    """llama-bench's, of one process."""
    found = []
    for tokens in (["-p", args.prompt, "-n", 0], ["-p", 0, "-n", args.new, "-d", args.prompt]):
        command = [program, "-m", file, "-t", args.threads, "-r", 1, "-o", "json", *tokens]
        answer = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
        found.append(float(json.loads(answer.stdout)[0]["avg_ts"]))
    return found[0], found[1]


# --- where the time goes -------------------------------------------------------------------------------------------


def share_in_linears(model: nn.Module, work: Callable[[], object]) -> float:
    """Which part of `work`'s time passes inside the linears of the blocks."""
    spent, began = 0.0, 0.0

    def before(*_: Any) -> None:
        nonlocal began
        began = time.perf_counter()

    def after(*_: Any) -> None:
        nonlocal spent
        spent += time.perf_counter() - began

    handles = []
    for module in model.get_submodule("model.layers").modules():
        if isinstance(module, QuantLinear | nn.Linear):
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    start = time.perf_counter()
    work()
    whole = time.perf_counter() - start
    for handle in handles:
        handle.remove()
    return spent / whole


def call_overhead(repeats: int = 2000) -> float:
    """Microseconds that `QuantLinear` adds to its backend: a small layer called as a module, less the backend by itself."""
    spec = WeightSpec(64, 64, 4, 32, True)
    layer = QuantLinear(random_weight(spec, 0, "cpu").pack())
    x = torch.randn(1, 64)
    layer.prepare(Target(x.device, x.dtype))
    backend, state = layer._backend, layer._state
    assert backend is not None

    def each(work: Callable[[], object]) -> float:
        samples = []
        for _ in range(repeats):
            began = time.perf_counter()
            work()
            samples.append(time.perf_counter() - began)
        return quantiles(samples)[1] * 1e6

    with torch.inference_mode():
        return each(lambda: layer(x)) - each(lambda: backend.apply(x, state))


# --- the run -------------------------------------------------------------------------------------------------------


def variants(args: argparse.Namespace, folder: Path) -> dict[str, Callable[[], tuple[float, float]]]:
    """What takes turns: everything loaded, prepared and warm. Says what is left out, and why."""
    source = Path(args.model)
    if args.model == "random-1.1b":
        source = folder / "float"
        random_llama(source)
    packed = folder / "packed"
    quantize_folder(source, packed, RtnConfig(group_size=args.group_size, search="minmax", device="cpu"))
    found: dict[str, Callable[[], tuple[float, float]]] = {}
    models = {
        name: Plain.from_pretrained(source, dtype=dtype)
        for name, dtype in PLAIN.items()
        if name in args.variants
    }
    for name, options in OURS.items():
        if name in args.variants:
            models[name] = AutoModelForCausalLM.from_pretrained(packed, device_map="cpu", **options)
    if ALL_PACKED.keys() & set(args.variants):
        with_head = folder / "packed-head"
        head = {".*lm_head": {"bits": 8}}
        config = RtnConfig(
            group_size=args.group_size, search="minmax", device="cpu", quant_lm_head=True, overrides=head
        )
        quantize_folder(source, with_head, config)
        for name, options in ALL_PACKED.items():
            if name in args.variants:
                models[name] = AutoModelForCausalLM.from_pretrained(with_head, device_map="cpu", **options)
                fuse_shared_inputs(models[name])
    for name, model in models.items():
        found[name] = lambda model=model: rates(model.eval(), args.prompt, args.new)
        generate(model, torch.ones(1, 8, dtype=torch.int64), 2)
    if args.llama_bench is None:
        print("left out: llama.cpp: pass --llama-bench", flush=True)
    else:
        convert(packed, folder / "model.gguf", "gguf")
        found["llama.cpp"] = lambda: llama_rates(args.llama_bench, folder / "model.gguf", args)
    args.models = models
    return found


def measured(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """All rows, those of the turns first."""
    samples: dict[tuple[str, str], list[float]] = {}
    turns = variants(args, folder)
    for _ in range(args.rounds):
        for name, turn in turns.items():
            prefill, decode = turn()
            print(f"{name}: prefill {prefill:.4g}, decode {decode:.4g} tokens/s", flush=True)
            samples.setdefault((name, "prefill"), []).append(prefill)
            samples.setdefault((name, "decode"), []).append(decode)
    for (name, metric), values in samples.items():
        yield row(args, name, metric, "tokens/s", quantiles(values))
    ids = torch.ones(1, args.prompt, dtype=torch.int64)
    for name, model in args.models.items():
        for metric, new in (("prefill", 1), ("decode", args.new)):
            prompt = ids if metric == "prefill" else ids[:, :8]
            share = share_in_linears(model, lambda m=model, p=prompt, n=new: generate(m, p, n))
            yield row(args, name, f"{metric}: share in linears", "", (share,) * 3)
    yield row(args, "woq", "overhead of a call", "us", (call_overhead(),) * 3)


def row(
    args: argparse.Namespace, variant: str, metric: str, unit: str, values: tuple[float, ...]
) -> dict[str, Any]:
    cpu, isa = cpu_name()
    print(f"{variant}: {metric} {values[1]:.4g} {unit}", flush=True)
    return {
        "commit": args.commit, "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "cpu": cpu, "isa": isa,
        "threads": args.threads, "torch": torch.__version__, "model": Path(args.model).name,
        "group_size": args.group_size, "variant": variant, "metric": metric, "unit": unit,
        **{name: f"{value:.4g}" for name, value in zip(("p20", "p50", "p80"), values, strict=True)},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="random-1.1b", help="a float Llama's folder, or random-1.1b")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/model_cpu.csv"))
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    every = [*PLAIN, *OURS, *ALL_PACKED]
    parser.add_argument("--variants", nargs="+", default=every, choices=every)
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's program of this name")
    parser.add_argument("--work", type=Path, help="folder for what is written, instead of a temporary one")
    parser.add_argument("--commit", help="recorded in the CSV; by default asked of git")
    args = parser.parse_args()
    args.commit = args.commit or current_commit()
    torch.set_num_threads(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    new = not args.out.exists()
    with args.out.open("a", newline="") as file, tempfile.TemporaryDirectory(dir=args.work) as folder:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        for measurement in measured(args, Path(folder)):
            writer.writerow(measurement)
            file.flush()


if __name__ == "__main__":
    main()
