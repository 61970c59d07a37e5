"""`make test-interop` and `make test-vllm`: our folders in the hands of the libraries whose formats they are, and theirs in ours.

Each library runs in an environment of its own, by itself; what is not installed there is skipped with its name.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.interop.folders import logits, make_folder
from tests.interop.foreign_writers import gptq
from woq import AutoModelForCausalLM, RtnConfig, quantize_folder
from woq.interop.convert import Source, convert
from woq.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
PEERS, VLLM = (ROOT / name / "bin" / "python" for name in (".venv-interop", ".venv-vllm"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(python: Path, *arguments: object) -> None:
    """A module in another environment; its output is shown where it fails."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "2",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    command = [str(python), "-W", "ignore", "-m", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@functools.cache
def versions() -> dict[str, str]:
    """What is installed beside us."""
    if not PEERS.exists():
        return {}
    out = ROOT / ".venv-interop" / "versions.json"
    run(PEERS, "tests.interop.peers", "versions", out, out)
    found: dict[str, str] = json.loads(out.read_text())
    return found


def need(package: str) -> None:
    """Skip where `package` is not in that environment."""
    if not PEERS.exists():
        pytest.skip("no .venv-interop: make test-interop makes it")
    if package not in versions():
        pytest.skip(f"{package} is not installed in .venv-interop")
    print(f"{package} {versions()[package]}")  # noqa: T201 - the version belongs to the result


# --- what peers wrote --------------------------------------------------------------------------------------------

WRITERS = {
    "bnb_nf4": "bitsandbytes",
    "bnb_fp4": "bitsandbytes",
    "bnb_int8": "bitsandbytes",
    "hqq": "hqq",
    "torchao": "torchao",
    "ct_3bit": "compressed-tensors",
    "ct_4bit": "compressed-tensors",
    "ct_8bit": "compressed-tensors",
}


@pytest.mark.parametrize("writer", WRITERS)
def test_reads_what_a_peer_wrote(writer: str, tmp_path: Path) -> None:
    """Every weight as the peer itself dequantizes it: the same to the bit, but where it divides by 127 in another order."""
    need(WRITERS[writer])
    run(PEERS, "tests.interop.peers", writer, tmp_path / "weights", tmp_path / "folder")
    source, expected = Source(tmp_path / "folder"), load_file(tmp_path / "weights")
    assert source.layers.keys() == expected.keys()
    for name, weight in expected.items():
        got = source.weight(name).dequantize()
        assert float((got - weight).abs().max()) <= 2e-7 * float(weight.abs().max()) * (writer == "bnb_int8")
    AutoModelForCausalLM.from_pretrained(tmp_path / "folder", device_map="cpu")


# --- what peers read ---------------------------------------------------------------------------------------------


def converted(tmp_path: Path, to: str, **how: Any) -> Any:
    """A tiny Llama in the format `to`; returns the float model that it means."""
    config = {"quant_method": "gptq", "group_size": 32, "checkpoint_format": "gptq_v2", "bits": how["bits"]}
    expected = make_folder(tmp_path / "source", lambda w: gptq(w, 0), config=config, **how)
    convert(tmp_path / "source", tmp_path / "folder", to)
    return expected


@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_reads_compressed_tensors(bits: int, tmp_path: Path) -> None:
    need("compressed-tensors")
    expected = converted(tmp_path, "compressed-tensors", bits=bits, sym=True)
    run(PEERS, "tests.interop.peers", "through_transformers", tmp_path / "out", tmp_path / "folder")
    torch.testing.assert_close(load_file(tmp_path / "out")["logits"], logits(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_decompresses_ours(bits: int, sym: bool, tmp_path: Path) -> None:
    need("compressed-tensors")
    converted(tmp_path, "compressed-tensors", bits=bits, sym=sym)
    run(PEERS, "tests.interop.peers", "through_compressed_tensors", tmp_path / "out", tmp_path / "folder")
    source, got = Source(tmp_path / "source"), load_file(tmp_path / "out")
    assert source.layers.keys() == got.keys()
    for name, weight in got.items():  # in the dtype of the scales, float16
        torch.testing.assert_close(weight, source.weight(name).dequantize(), rtol=2**-10, atol=0)


def test_auto_round_reads_ours(tmp_path: Path) -> None:
    """It runs in float16 whatever it is asked."""
    need("auto-round")
    expected = converted(tmp_path, "auto-round", bits=4, sym=True)
    run(PEERS, "tests.interop.peers", "through_transformers", tmp_path / "out", tmp_path / "folder")
    torch.testing.assert_close(load_file(tmp_path / "out")["logits"], logits(expected), rtol=0.02, atol=0.1)


@pytest.mark.parametrize(("to", "sym"), [("gptq", True), ("gptq_v2", False)])
def test_gptqmodel_reads_ours(to: str, sym: bool, tmp_path: Path) -> None:
    """Through transformers and optimum, in the dtype of its own kernel."""
    need("gptqmodel")
    expected = converted(tmp_path, to, bits=4, sym=sym)
    run(PEERS, "tests.interop.peers", "through_transformers", tmp_path / "out", tmp_path / "folder")
    torch.testing.assert_close(load_file(tmp_path / "out")["logits"], logits(expected), rtol=0.01, atol=0.05)


@pytest.fixture(scope="module")
def stories(stories15m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stories15M in GPTQ, compressed-tensors and GGUF form, and prompts."""
    folder = tmp_path_factory.mktemp("stories")
    quantize_folder(stories15m, folder / "gptq", RtnConfig(group_size=32), progress=Progress())
    convert(folder / "gptq", folder / "compressed-tensors", "compressed-tensors")
    convert(folder / "gptq", folder / "stories.gguf", "gguf")
    return folder


def texts(shared_dir: Path, count: int) -> list[str]:
    """The beginnings of `count` paragraphs."""
    paragraphs = (shared_dir / "data/text/tinystories-valid.txt").read_text().split("\n\n")
    found = [paragraph.strip()[:60] for paragraph in paragraphs if len(paragraph) > 100][:count]
    assert len(found) == count
    return found


def test_llama_cpp_reads_our_gguf(stories: Path, shared_dir: Path) -> None:
    """Its tokens and its greedy text are ours; its 8-bit activations may turn a near tie, late."""
    need("xllamacpp")
    prompts = texts(shared_dir, 5)
    (stories / "prompts.json").write_text(json.dumps(prompts))
    run(PEERS, "tests.interop.peers", "through_llama_cpp", stories / "out.json", stories / "stories.gguf")
    model = AutoModelForCausalLM.from_pretrained(stories / "gptq", device_map="cpu", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(stories / "gptq")
    same = 0
    for prompt, (count, text) in zip(prompts, json.loads((stories / "out.json").read_text()), strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert count == ids.shape[1]
        ours = model.generate(ids, do_sample=False, max_new_tokens=24)[0]
        text_of_ours = tokenizer.decode(ours, skip_special_tokens=True)
        text_of_ours = text_of_ours[len(tokenizer.decode(ids[0], skip_special_tokens=True)) :]
        assert text[:10] == text_of_ours[:10]
        same += text == text_of_ours
    assert same >= 3


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_vllm_continues_as_we_do(form: str, stories: Path, shared_dir: Path) -> None:
    """32 greedy tokens on 20 prompts: the same, or from the first difference on a tie in bfloat16."""
    if not VLLM.exists():
        pytest.skip("no .venv-vllm: make test-vllm makes it")
    tokenizer = AutoTokenizer.from_pretrained(stories / form)
    prompts = [tokenizer(text).input_ids[:16] for text in texts(shared_dir, 20)]
    (stories / "tokens.json").write_text(json.dumps(prompts))
    run(VLLM, "tests.interop.vllm_reader", stories / f"{form}.json", stories / form, stories / "tokens.json")
    found = json.loads((stories / f"{form}.json").read_text())
    answers = found["answers"]
    assert len(answers) == 20 and all(len(answer) == 32 for answer in answers)
    print(f"vLLM {found['version']}, product by reference: {found['product_by_reference']}")  # noqa: T201
    model = AutoModelForCausalLM.from_pretrained(stories / form, device_map="cpu", dtype=torch.float32)
    differing = [
        len(tie) for p, a in zip(prompts, answers, strict=True) if (tie := first_difference(model, p, a))
    ]
    assert len(differing) < 15  # a wrong weight would part them all, and by more than a tie


def first_difference(model: Any, prompt: list[int], answer: list[int]) -> list[float]:
    """[] where `answer` is what we say too; else how far apart the two tokens' logits are, which must be a tie."""
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        scores = model(ids).logits[0, len(prompt) - 1 : -1]
    best = scores.argmax(-1)
    wrong = (best != ids[0, len(prompt) :]).nonzero().flatten()
    if not len(wrong):
        return []
    at = int(wrong[0])
    gap = float(scores[at, best[at]] - scores[at, answer[at]])
    assert gap < 0.01 * float(scores[at].abs().max()), f"token {at}: logits differ by {gap}"
    return [gap]
