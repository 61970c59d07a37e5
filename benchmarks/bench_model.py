"""Tokens a second of a Llama-3-8B-shaped model with random weights on one GPU: bf16, then its linears packed, in one run.

    python -m benchmarks.bench_model --out benchmarks/results/model_h200.csv

The model is made on the device; after the bf16 figures every linear of its decoder layers is rounded to nearest and replaced
by a `QuantLinear`, in place, and those that share an input are fused, so that nothing is written to disk and both runs share
everything else; with `--head packed` the output head follows, for figures of its own. Decoding: batch 1, static cache, one
step in a CUDA graph, every token the argmax of the step before. Prefill: one forward of 2048 tokens. In all runs
torch.compile fuses what is around the linears: norms, rotary embedding and the gated activation, or with `--compile step`,
for decoding, all that a step does: one graph, about a minute for 32 layers.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
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
    "head",
    "compiled",
    "attention",
    "launch",
    "layers",
    "phase",
    "tokens",
    "unit",
    "p20",
    "p50",
    "p80",
]
BF16 = torch.bfloat16

Step = Callable[[], None]


def of_one_token(attend: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, None]]:
    """transformers' "sdpa", but for a decoding step `attend`, which need not repeat keys and values.

    attend(rows [batch, fewer heads, queries of a key, size], key, value [batch, fewer heads, length, size], mask, scaling)
    -> as `rows`
    """

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        batch, heads, tokens, size = query.shape
        if tokens > 1:
            result: tuple[Tensor, None] = sdpa_attention_forward(
                module, query, key, value, attention_mask, **options
            )
            return result
        rows = query.reshape(batch, key.shape[1], -1, size)
        y = attend(rows, key, value, attention_mask, options["scaling"])
        return y.reshape(batch, tokens, heads, size), None

    return attention


@of_one_token
def grouped_attention(
    rows: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    return nn.functional.scaled_dot_product_attention(rows, key, value, mask, scale=scaling)


@of_one_token
def multiplied_attention(
    rows: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """Two products around a softmax: SDPA's kernels are made for many tokens."""
    scores = rows @ key.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def greedy(logits: Tensor) -> Tensor:
    """argmax of [1, vocabulary] -> [1, 1], in two steps: a compiler gives one row to one thread block."""
    parts = logits.view(math.gcd(logits.shape[-1], 256), -1)
    best = parts.max(-1)
    part = best.values.argmax(-1, keepdim=True)
    return (part * parts.shape[1] + best.indices[part])[None]


def llama(
    layers: int, hidden: int, vocabulary: int, device: str, attention: str = "sdpa"
) -> LlamaForCausalLM:
    """Llama-3-8B's shape for hidden == 4096, made on the device, weights of its initialisation."""
    AttentionInterface.register("grouped", grouped_attention)
    AttentionInterface.register("products", multiplied_attention)
    for name in ("grouped", "products"):
        AttentionMaskInterface.register(name, sdpa_mask)
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
        return LlamaForCausalLM._from_config(config, dtype=BF16, attn_implementation=attention).eval()


@torch.no_grad()
def pack(module: nn.Module, bits: int, group_size: int, backend: str) -> None:
    """Replace every linear among the children of `module` and theirs."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            spec = WeightSpec(child.in_features, child.out_features, bits, group_size, True, scale_dtype=BF16)
            packed = round_to_nearest(child.weight.float(), spec, "minmax").pack()
            setattr(module, name, QuantLinear(packed, backend=backend))
        else:
            pack(child, bits, group_size, backend)


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


def captured(step: Step) -> Step:
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


@torch.inference_mode()
def decode_rates(
    model: LlamaForCausalLM, prompt: int, steps: int, repeats: int, compiled: Callable[[Step], Step]
) -> list[float]:
    """Tokens a second of `repeats` runs of `steps` replays of one decoding step, or of what `compiled` makes of it."""
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
        token.copy_(greedy(logits[:, -1]))
        position.add_(1)

    replay = compiled(step)
    print(f"first step: {timed(replay, model.device):.1f} s", flush=True)
    if model.device.type == "cuda":
        replay = captured(replay)
    rates = []
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
        choices=["nothing", "parts", "step"],
        default="parts",
        help="what torch.compile fuses around the linears; step: for decoding, everything, a minute for 32 layers",
    )
    parser.add_argument(
        "--head",
        choices=["float", "packed"],
        default="float",
        help="packed: measured once more with it packed too",
    )
    parser.add_argument(
        "--attention",
        choices=["sdpa", "grouped", "products"],
        default="sdpa",
        help="of a decoding step; grouped: SDPA that does not repeat keys and values; products: two of them and a softmax",
    )
    parser.add_argument(
        "--launch",
        choices=["usual", "early"],
        default="usual",
        help="early: the compiler's kernels too start before their predecessor has ended (programmatic launch)",
    )
    parser.add_argument("--apart", action="store_true", help="do not fuse linears that share an input")
    parser.add_argument("--commit", help="recorded in the CSV; by default asked of git")
    return parser.parse_args()


def stages(model: LlamaForCausalLM, args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Pack one part of the model after another; what it is by then, as in a row of the CSV."""
    yield {"backend": "bf16", "bits": 16, "head": "float"}
    options = (args.bits, args.group_size, args.backend)
    seconds = timed(lambda: pack(model.model, *options), model.device)
    if not args.apart:
        fuse_shared_inputs(model)
    print(f"packed in {seconds:.1f} s", flush=True)
    yield {"backend": args.backend, "bits": args.bits, "head": "float"}
    if args.head == "packed":
        pack(model, *options)
        yield {"backend": args.backend, "bits": args.bits, "head": "packed"}


def phases(model: LlamaForCausalLM, args: argparse.Namespace) -> Iterator[tuple[str, str, int, list[float]]]:
    """Phase, unit, tokens of a step, and the sorted measurements."""
    whole: Callable[[Step], Step] = partial(torch.compile, dynamic=False)
    compiled = whole if args.compile == "step" else lambda step: step
    yield "decode", "tokens/s", 1, decode_rates(model, args.prompt, args.steps, args.repeats, compiled)
    yield "prefill", "ms", args.prefill, prefill_times(model, args.prefill, args.repeats)


def measure(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """The rows of the CSV, as they come; prints what they say."""
    commit = args.commit or current_commit()
    inductor.triton.enable_pdl = args.launch == "early"
    if args.compile != "nothing":
        compile_small_parts()
    model = llama(args.layers, args.hidden, args.vocabulary, args.device, args.attention)
    bf16: dict[str, float] = {}
    for stage in stages(model, args):
        for phase, unit, tokens, values in phases(model, args):
            p20, p50, p80 = (values[int(q * (len(values) - 1))] for q in (0.2, 0.5, 0.8))
            gain = p50 / bf16.setdefault(phase, p50)
            name = f"{stage['backend']}, head {stage['head']}, {phase}"
            print(
                f"{name}: {p50:.5g} {unit}, {gain if phase == 'decode' else 1 / gain:.2f}x of bf16",
                flush=True,
            )
            yield {
                "commit": commit,
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                "gpu": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
                "torch": torch.__version__,
                "model": f"llama {args.hidden}",
                **stage,
                "group_size": args.group_size,
                "compiled": args.compile,
                "attention": args.attention,
                "launch": args.launch,
                "layers": args.layers,
                "phase": phase,
                "tokens": tokens,
                "unit": unit,
                "p20": f"{p20:.5g}",
                "p50": f"{p50:.5g}",
                "p80": f"{p80:.5g}",
            }


def main() -> None:
    args = arguments()
    new = not args.out.exists()
    with args.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        for row in measure(args):
            writer.writerow(row)
            file.flush()


if __name__ == "__main__":
    main()
