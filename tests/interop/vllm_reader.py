"""Runs inside vLLM's own environment (`make test-vllm`): greedy continuations of token prompts, as JSON.

    python -m tests.interop.vllm_reader OUT FOLDER PROMPTS      PROMPTS: JSON, a list of lists of token ids

Nothing here imports woq. vLLM's CPU build has its 4-bit product, `cpu_gemm_wna16`, for AVX-512 alone. Where it is
missing, a reference of that one operator stands in, on the weights as vLLM itself loaded, fused and laid them out; OUT
says so.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, library

NEW_TOKENS = 32
MISSING = "cpu_gemm_wna16"
_SCHEMA = (
    f"{MISSING}(Tensor x, Tensor weight, Tensor! output, Tensor scales, Tensor? zeros, Tensor? bias, "
    "int pack_factor, str isa_hint) -> ()"
)


def reference(
    x: Tensor, weight: Tensor, output: Tensor, scales: Tensor, zeros: Any, bias: Any, pack: int, _: str
) -> None:
    """weight int32 [N/16, K * 2]: blocks of 16 outputs, of each input two words, the first output lowest."""
    blocks, inputs = weight.shape[0], weight.shape[1] * pack // 16
    shifts = torch.arange(0, 32, 32 // pack)
    codes = (weight.view(blocks, inputs, 2, 1) >> shifts & 15).reshape(blocks, inputs, 16)
    codes = codes.transpose(0, 1).reshape(inputs, blocks * 16)
    group = torch.arange(inputs) // (inputs // scales.shape[0])
    offset = 8 if zeros is None else (zeros.unsqueeze(-1) >> shifts & 15).flatten(1)[group]
    dense = (codes - offset).float() * scales.float()[group]
    product = x.float() @ dense
    output.copy_(product if bias is None else product + bias.float())


def stand_in() -> bool:
    """Register `reference` where vLLM's build for this processor has no such operator; whether it was needed."""
    import vllm._custom_ops  # noqa: F401 - loads what there is

    if hasattr(torch.ops._C, MISSING):
        return False
    fragment = library.Library("_C", "FRAGMENT")
    fragment.define(_SCHEMA)
    fragment.impl(MISSING, reference, "CPU")
    WorkerExtension.kept = fragment
    return True


class WorkerExtension:
    """vLLM imports this in the process that computes."""

    kept: Any = None


def main(out: str, folder: str, prompts: str) -> None:
    """See the module's head."""
    import vllm

    model = vllm.LLM(
        folder, dtype="bfloat16", max_model_len=256, enforce_eager=True, max_num_seqs=4, gpu_memory_utilization=0.1,
        worker_extension_cls="tests.interop.vllm_reader.WorkerExtension",
    )  # fmt: skip
    greedy = vllm.SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    inputs = [{"prompt_token_ids": ids} for ids in json.loads(Path(prompts).read_text())]
    answers = [list(answer.outputs[0].token_ids) for answer in model.generate(inputs, greedy)]
    result = {"version": vllm.__version__, "product_by_reference": stand_in(), "answers": answers}
    Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
else:
    stand_in()
