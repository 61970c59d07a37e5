"""Tokens a second of a Llama-3-8B-shaped model with random weights on one GPU: bf16, then its linears packed, in one run.

    python -m benchmarks.bench_model --out benchmarks/results/model_h200.csv

The model is made on the device; after the bf16 figures every linear of its decoder layers is rounded to nearest and replaced
by a `QuantLinear`, in place, and those that share an input are fused, so that nothing is written to disk and both runs share
everything else. Decoding: batch 1, static cache, one step in a CUDA graph, every token the argmax of the step before.
Prefill: one forward of 2048 tokens. In both runs torch.compile fuses what is around the linears: norms, rotary embedding and
the gated activation, or with `--compile layers`, for decoding, each decoder layer as a whole.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.llama import modeling_llama

from benchmarks.common import current_commit
from woq.algorithms.rtn import round_to_nearest
from woq.linear import QuantLinear
from woq.shared_input import fuse_shared_inputs
from woq.weights import WeightSpec

FIELDS = [
    "commit",
    "date",
    "gpu",
    "torch",
    "model",
    "backend",
    "bits",
    "group_size",
    "layers",
    "phase",
    "tokens",
    "unit",
    "p20",
    "p50",
    "p80",
]
BF16 = torch.bfloat16


def llama(layers: int, hidden: int, vocabulary: int, device: str) -> LlamaForCausalLM:
    """Llama-3-8B's shape for hidden == 4096, made on the device, weights of its initialisation."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=max(1, hidden // 512),
        head_dim=128,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        dtype=BF16,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=BF16).eval()


@torch.no_grad()
def pack_layers(model: nn.Module, bits: int, group_size: int, backend: str) -> None:
    """Replace every linear of the decoder layers; the head stays, as `quantize` leaves it unless asked."""
    for parent in [
        m for m in model.model.layers.modules() if any(isinstance(c, nn.Linear) for c in m.children())
    ]:
        for name, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear):
                spec = WeightSpec(
                    linear.in_features, linear.out_features, bits, group_size, True, scale_dtype=BF16
                )
                packed = round_to_nearest(linear.weight.float(), spec, "minmax").pack()
                setattr(parent, name, QuantLinear(packed, backend=backend))


def compile_small_parts() -> None:
    modeling_llama.LlamaRMSNorm.forward = torch.compile(modeling_llama.LlamaRMSNorm.forward, dynamic=False)
    modeling_llama.apply_rotary_pos_emb = torch.compile(modeling_llama.apply_rotary_pos_emb, dynamic=False)
    gate = torch.compile(lambda g, u: nn.functional.silu(g) * u, dynamic=False)

    def gated(self: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(gate(self.gate_proj(x), self.up_proj(x)))
        return y

    modeling_llama.LlamaMLP.forward = gated


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds from an idle device to an idle device."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """`step` as a CUDA graph, after two calls that may allocate, compile and prepare."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@contextmanager
def compiled_layers(model: LlamaForCausalLM) -> Iterator[None]:
    """Every decoder layer compiled by itself. Each has its own number and cache, so each is traced; the code is found again."""
    torch._dynamo.config.recompile_limit = 2 * len(model.model.layers) + 8
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    yield
    for layer in model.model.layers:
        layer._compiled_call_impl = None


@torch.inference_mode()
def decode_rates(
    model: LlamaForCausalLM, prompt: int, steps: int, repeats: int, compiled: AbstractContextManager[None]
) -> list[float]:
    """Tokens a second of `repeats` runs of `steps` replays of one decoding step."""
    cache = StaticCache(config=model.config, max_cache_len=prompt + steps * (repeats + 1) + 8)
    ids = torch.randint(0, model.config.vocab_size, (1, prompt), device=model.device)
    position = torch.full((1,), prompt, device=model.device)
    token = (
        model(
            ids,
            past_key_values=cache,
            cache_position=torch.arange(prompt, device=model.device),
            logits_to_keep=1,
        )
        .logits[:, -1]
        .argmax(-1, keepdim=True)
    )

    def step() -> None:
        logits = model(
            token, past_key_values=cache, cache_position=position, position_ids=position[None]
        ).logits
        token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        position.add_(1)

    rates = []
    with compiled:
        replay = captured(step) if model.device.type == "cuda" else step
        for _ in range(repeats):
            seconds = timed(lambda: [replay() for _ in range(steps)], model.device)
            rates.append(steps / seconds)
    return sorted(rates)


@torch.inference_mode()
def prefill_times(model: LlamaForCausalLM, tokens: int, repeats: int) -> list[float]:
    """Milliseconds of a forward of `tokens` tokens, logits of the last one alone."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=model.device)
    times = [
        timed(lambda: model(ids, use_cache=False, logits_to_keep=1), model.device) * 1e3
        for _ in range(repeats + 2)
    ]
    return sorted(times[2:])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/model.csv"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096, help="4096 is Llama-3-8B's")
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--device", default="cuda", help="'cpu' is for trying the script: no graph there")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--compile",
        choices=["nothing", "parts", "layers"],
        default="parts",
        help="what torch.compile fuses around the linears; layers: for decoding, minutes for 32 of them",
    )
    parser.add_argument("--apart", action="store_true", help="do not fuse linears that share an input")
    parser.add_argument("--commit", help="recorded in the CSV; by default asked of git")
    return parser.parse_args()


def phases(model: LlamaForCausalLM, args: argparse.Namespace) -> Iterator[tuple[str, str, int, list[float]]]:
    """Phase, unit, tokens of a step, and the sorted measurements."""
    compiled = compiled_layers(model) if args.compile == "layers" else nullcontext()
    yield "decode", "tokens/s", 1, decode_rates(model, args.prompt, args.steps, args.repeats, compiled)
    yield "prefill", "ms", args.prefill, prefill_times(model, args.prefill, args.repeats)


def main() -> None:
    args = arguments()
    commit = args.commit or current_commit()
    if args.compile != "nothing":
        compile_small_parts()
    model = llama(args.layers, args.hidden, args.vocabulary, args.device)
    new = not args.out.exists()
    with args.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        medians = {}
        for backend in ("bf16", args.backend):
            if backend != "bf16":
                seconds = timed(
                    lambda: pack_layers(model, args.bits, args.group_size, args.backend), model.device
                )
                if not args.apart:
                    fuse_shared_inputs(model)
                print(f"packed in {seconds:.1f} s", flush=True)
            for phase, unit, tokens, values in phases(model, args):
                p20, p50, p80 = (values[int(q * (len(values) - 1))] for q in (0.2, 0.5, 0.8))
                medians[backend, phase] = p50
                writer.writerow(
                    {
                        "commit": commit,
                        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                        "gpu": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
                        "torch": torch.__version__,
                        "model": f"llama {args.hidden}",
                        "backend": backend,
                        "bits": 16 if backend == "bf16" else args.bits,
                        "group_size": args.group_size,
                        "layers": args.layers,
                        "phase": phase,
                        "tokens": tokens,
                        "unit": unit,
                        "p20": f"{p20:.5g}",
                        "p50": f"{p50:.5g}",
                        "p80": f"{p80:.5g}",
                    }
                )
                print(f"{backend} {phase}: {p50:.5g} {unit}", flush=True)
    decode = medians[args.backend, "decode"] / medians["bf16", "decode"]
    print(
        f"decode {decode:.2f}x of bf16, prefill {medians['bf16', 'prefill'] / medians[args.backend, 'prefill']:.2f}x"
    )


if __name__ == "__main__":
    main()
