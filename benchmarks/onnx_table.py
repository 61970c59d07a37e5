"""Size and perplexity of a model in ONNX Runtime: float, 8 bits without and with GPTQ, 4 bits with GPTQ.

    python benchmarks/onnx_table.py --folder /path/to/SmolLM2-135M-Instruct --data ../shared/data --work DIR

Calibration and test windows are the fixed ones of data/quality (tensors "calib" and "test"). Folders in --work that are
there already are used as they are.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from woq import config_from_dict, quantize_folder
from woq.evaluation import perplexity
from woq.export.onnx import DATA, MODEL, export_onnx
from woq.export.runtime import OnnxCausalLM

ROWS: dict[str, dict[str, Any] | None] = {
    "float": None,
    "8 bit, RTN": {"quant_method": "rtn", "bits": 8},
    "8 bit, GPTQ": {"quant_method": "gptq", "bits": 8},
    "4 bit, RTN": {"quant_method": "rtn", "bits": 4},
    "4 bit, GPTQ": {"quant_method": "gptq", "bits": 4},
}


def measure(name: str, options: argparse.Namespace, calib: Tensor, test: Tensor) -> dict[str, Any]:
    """One row: quantize, export, run."""
    settings = ROWS[name]
    folder: Path = options.folder
    work = options.work / name.replace(", ", "-").replace(" ", "")
    if settings is not None:
        folder = work.with_name(f"{work.name}-woq")
        if not folder.exists():
            data = (
                {}
                if settings["quant_method"] == "rtn"
                else {"num_samples": len(calib), "seq_len": calib.shape[1]}
            )
            config = config_from_dict({**settings, "group_size": options.group_size, "device": "cpu", **data})
            quantize_folder(options.folder, folder, config, calib if data else None)
    exported = work.with_name(f"{work.name}-onnx")
    if not exported.exists():
        export_onnx(folder, exported)
    started = time.perf_counter()
    found = perplexity(OnnxCausalLM(exported), test, batch_size=1)
    return {
        "row": name,
        "megabytes": round(sum((exported / file).stat().st_size for file in (MODEL, DATA)) / 1e6, 1),
        "perplexity": round(found.value, 3),
        "group_size": options.group_size if settings else "",
        "windows": len(test),
        "calibration_samples": len(calib) if settings and settings["quant_method"] == "gptq" else "",
        "eval_seconds": round(time.perf_counter() - started, 1),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="the float checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="folder with quality/")
    parser.add_argument("--tokens", default="smollm2-135m", help="name of the token file in quality/")
    parser.add_argument("--work", type=Path, required=True, help="where folders are put")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--windows", type=int, help="test windows; default: all")
    parser.add_argument("--samples", type=int, help="calibration windows; default: all")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--out", type=Path, required=True, help="CSV to write")
    options = parser.parse_args()
    tokens = load_file(options.data / "quality" / f"{options.tokens}.safetensors")
    calib, test = tokens["calib"].long()[: options.samples], tokens["test"].long()[: options.windows]
    options.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in options.rows:
        rows.append(measure(name, options, calib, test))
        print(rows[-1], flush=True)
        with options.out.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
