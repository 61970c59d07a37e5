"""Runs inside vLLM's own environment (`make test-vllm`): greedy continuations of token prompts, as JSON.

    python -m tests.interop.vllm_reader OUT FOLDER PROMPTS      PROMPTS: JSON, a list of lists of token ids

Nothing here imports woq.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

NEW_TOKENS = 32


def main(out: str, folder: str, prompts: str) -> None:
    """See the module's head."""
    import vllm

    model = vllm.LLM(
        folder,
        dtype="bfloat16",
        max_model_len=256,
        enforce_eager=True,
        max_num_seqs=4,
        gpu_memory_utilization=0.1,
    )
    greedy = vllm.SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    inputs = [{"prompt_token_ids": ids} for ids in json.loads(Path(prompts).read_text())]
    answers = [list(answer.outputs[0].token_ids) for answer in model.generate(inputs, greedy)]
    Path(out).write_text(json.dumps({"version": vllm.__version__, "answers": answers}))


if __name__ == "__main__":
    main(*sys.argv[1:])
