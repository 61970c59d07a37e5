"""Run inside IPEX's own environment (`make test-ipex`), by tests/backends/test_ipex.py.

    python -m tests.ipex_reader selftest OUT              the self-test's rows, as JSON
    python -m tests.ipex_reader woq|ipex OUT FOLDER...    logits of each folder, float32 and bfloat16, as safetensors

`ipex.llm.optimize` takes bfloat16 only on processors with AVX-512 or AVX-NE-CONVERT; elsewhere float32 stands alone.

"woq" loads a folder with `backend="ipex"`; "ipex" with `ipex.llm.optimize(low_precision_checkpoint=...)`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def through_woq(folder: str, dtype: torch.dtype) -> Any:
    """The way of our users."""
    from woq import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", backend="ipex", dtype=dtype)


def through_ipex(folder: str, dtype: torch.dtype) -> Any:
    """The way of IPEX's users, from its own documentation."""
    import intel_extension_for_pytorch as ipex
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, torch_dtype=dtype).eval()
    recipe = ipex.quantization.get_weight_only_quant_qconfig_mapping(
        weight_dtype=ipex.quantization.WoqWeightDtype.INT4,
        lowp_mode=ipex.quantization.WoqLowpMode.NONE,
        group_size=32,
    )
    return ipex.llm.optimize(
        model,
        dtype=dtype,
        quantization_config=recipe,
        low_precision_checkpoint=ipex.llm.utils.load_low_precision_checkpoint(folder),
        inplace=True,
        deployment_mode=False,
    )


def dtypes(mode: str) -> dict[str, torch.dtype]:
    """What `mode` can run in here."""
    if mode == "ipex":
        import intel_extension_for_pytorch._C as core

        if not core.onednn_has_bf16_support():
            return {"float32": torch.float32}
    return DTYPES


def main(mode: str, out: str, *folders: str) -> None:
    """See the module's head."""
    if mode == "selftest":
        from woq.selftest import run_selftest

        rows = [asdict(row) | {"passed": row.passed} for row in run_selftest() if row.backend == "ipex"]
        Path(out).write_text(json.dumps(rows))
        return
    load = {"woq": through_woq, "ipex": through_ipex}[mode]
    logits = {}
    for folder in folders:
        ids = load_file(f"{folder}/ids.tensors")["ids"]
        for name, dtype in dtypes(mode).items():
            with torch.no_grad():
                logits[f"{Path(folder).name} {name}"] = load(folder, dtype)(ids).logits.float().contiguous()
    save_file(logits, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
