"""Whole models in ONNX Runtime: the same logits, through the cache, with padding, from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import woq
from woq.cli import app
from woq.errors import CheckpointError, ConfigError
from woq.evaluation import compare
from woq.evaluation.folders import Request, evaluate_folder

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # tracing is minutes on a busy machine

# Two ways through an export each: act-order, an odd width and tied-off biases; sliding windows beside full attention.
MODELS: dict[str, woq.QuantConfig] = {
    "llama": woq.GPTQConfig(bits=4, group_size=32, desc_act=True, act_group_aware=False, num_samples=4, seq_len=32,
                            device="cpu"),
    "gemma3": woq.RtnConfig(bits=3, group_size=32, sym=False, device="cpu"),
}  # fmt: skip


@pytest.fixture(scope="module", params=list(MODELS))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the quantized folder, the folder that the command line made of it)."""
    from tests.tiny_models import TINY_ARCHITECTURES

    folder = tmp_path_factory.mktemp(request.param)
    model, config = TINY_ARCHITECTURES[request.param](), MODELS[request.param]
    rows = torch.randint(3, 128, (4, 32), generator=torch.Generator().manual_seed(0))
    woq.quantize(model, config, rows)
    woq.save_pretrained(model, folder / "packed")
    done = CliRunner().invoke(app, ["export", "onnx", str(folder / "packed"), str(folder / "onnx")])
    assert done.exit_code == 0, done.output
    return folder / "packed", folder / "onnx"


def test_the_same_model(exported: tuple[Path, Path], tmp_path: Path) -> None:
    from woq.export.runtime import OnnxCausalLM

    packed, folder = exported
    model = woq.AutoModelForCausalLM.from_pretrained(packed, device_map="cpu", dtype="float32")
    other = OnnxCausalLM(folder)
    ids = torch.randint(3, 128, (3, 20), generator=torch.Generator().manual_seed(1))
    assert compare(other, model, ids).kl < 1e-6
    greedy = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(other.generate(ids, 6), greedy)

    mask = torch.ones_like(ids)
    mask[0, :7] = 0  # padded on the left: the other tokens see none of it
    padded = other(ids, mask).logits[0, 7:]
    torch.testing.assert_close(padded, other(ids[:1, 7:]).logits[0], atol=1e-3, rtol=1e-3)

    save_file({"ids": ids.to(torch.int32)}, tmp_path / "t.safetensors")
    request = Request(tokens=str(tmp_path / "t.safetensors"))
    by_onnx, by_torch = (
        evaluate_folder(f, None, request, device_map="cpu", dtype="float32") for f in (folder, packed)
    )
    assert by_onnx["perplexity"] == pytest.approx(by_torch["perplexity"], rel=1e-4)
    with pytest.raises(ConfigError, match="runs in ONNX Runtime on the CPU"):
        evaluate_folder(folder, None, request, backend="cuda")


def test_what_the_graph_holds(exported: tuple[Path, Path]) -> None:
    _, folder = exported
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(nodes) in (14, 21) and all(node.domain == "com.microsoft" for node in nodes)
    tables = [tensor.name for tensor in graph.initializer if list(tensor.dims) == [128, 64]]
    assert len(tables) == (
        1 if len(nodes) == 21 else 2
    )  # Gemma's head is its embeddings' table, and stored once
    names = [value.name for value in graph.input]
    assert names[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert names[3:5] == ["past_key_values.0.key", "past_key_values.0.value"]
    assert [value.name for value in graph.output][:2] == ["logits", "present.0.key"]


def test_refusals(
    exported: tuple[Path, Path], tiny_model: Callable[[str], nn.Module], tmp_path: Path, monkeypatch: Any
) -> None:
    from woq.export.onnx import export_onnx
    from woq.export.runtime import OnnxCausalLM

    packed, folder = exported
    with pytest.raises(CheckpointError, match="exists"):
        export_onnx(packed, folder)
    tiny_model("mixtral").save_pretrained(tmp_path / "experts")
    with pytest.raises(CheckpointError, match="routes tokens to experts"):
        export_onnx(tmp_path / "experts", tmp_path / "out")
    model = tiny_model("llama")
    woq.quantize(model, woq.RtnConfig(group_size=8, device="cpu"))
    woq.save_pretrained(model, tmp_path / "small")
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.\S+ cannot be exported: group size 8"):
        export_onnx(tmp_path / "small", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    with pytest.raises(CheckpointError, match="cannot be run"):
        OnnxCausalLM(packed)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs \['onnx', 'onnxscript', 'onnxruntime'\]"):
        export_onnx(packed, tmp_path / "out")
