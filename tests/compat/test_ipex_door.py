"""`ipex.quantization.gptq` with one changed import: what it writes is what IPEX's layout says, and reads back the same."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import woq.compat.ipex as ipex
from tests.tiny_models import VOCABULARY
from woq import AutoModelForCausalLM
from woq.compat.samples import windows
from woq.errors import CalibrationError, CheckpointError, ConfigError
from woq.interop.folder import QuantizedFolder
from woq.linear import QuantLinear

pytestmark = pytest.mark.filterwarnings("ignore::woq.calibration.CalibrationWarning")
LAYERS = 14


def loader(count: int = 6, length: int = 24) -> DataLoader[Any]:
    """As IPEX's example makes it: one row a batch, and where its last token is."""
    draw = torch.Generator().manual_seed(3)
    rows = torch.randint(3, VOCABULARY, (count, length), generator=draw)
    return DataLoader(
        [(row, length - 1) for row in rows],  # type: ignore[arg-type]
        batch_size=1,
        collate_fn=lambda batch: (
            torch.vstack([row for row, _ in batch]),
            torch.tensor([n for _, n in batch]),
        ),
    )


def decoded(state: dict[str, Tensor], name: str) -> Tensor:
    """The float weight [N, K] by IPEX's layout, word by word: nothing of woq is asked."""
    words, scales, stored = (state[f"{name}.{part}"] for part in ("qweight", "scales", "qzeros"))
    inputs, outputs = words.shape[0] * 8, words.shape[1]
    codes = torch.stack([words[k // 8] >> 4 * (k % 8) & 15 for k in range(inputs)], 1)
    zeros = torch.stack([stored[:, n // 8] >> 4 * (n % 8) & 15 for n in range(outputs)])
    zeros = (zeros + 1) % 16  # 15 stands for 0
    group = state.get(f"{name}.g_idx", torch.arange(inputs) // (inputs // scales.shape[0])).long()
    return (codes - zeros[:, group]) * scales.t().float()[:, group]


@pytest.mark.parametrize(
    ("sym", "act_order", "group_size"), [(False, False, 32), (False, True, 32), (True, False, -1)]
)
def test_what_it_writes(
    sym: bool, act_order: bool, group_size: int, tiny_model: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    model = ipex.quantization.gptq(
        model=tiny_model("llama"), dataloader=loader(), group_size=group_size, wbits=4, sym=sym, percdamp=0.05,
        act_order=act_order, nsamples=4, use_max_length=True, pad_max_length=24, layer_wise=False,
        compression_dtype=torch.int32, compression_dim=1, scale_dtype=torch.float16, save_dir=str(tmp_path),
    )  # fmt: skip
    state = torch.load(tmp_path / f"gptq_checkpoint_g{group_size}.pt", weights_only=True)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert len(layers) == LAYERS
    for name, layer in layers.items():
        assert state[f"{name}.qweight"].shape == (layer.in_features // 8, layer.out_features)
        assert (f"{name}.g_idx" in state) == (act_order and group_size != -1)
        torch.testing.assert_close(decoded(state, name), layer.dequantize(), rtol=0, atol=0)
    for name, parameter in model.named_parameters():
        assert torch.equal(state[name], parameter)
    read_back(model, tmp_path)


def read_back(model: Any, folder: Path) -> None:
    """The folder, and the file alone beside a plain config.json as IPEX's own writer left it: the same logits."""
    bare = folder / "bare"
    bare.mkdir()
    shutil.copy(next(folder.glob("*.pt")), bare)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (bare / "config.json").write_text(json.dumps(config))
    ids = next(iter(loader()))[0]
    for place in (folder, bare):
        assert QuantizedFolder(place).reader.format == "ipex"
        again = AutoModelForCausalLM.from_pretrained(place, device_map="cpu")
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_descriptions_it_writes(tiny_model: Callable[[str], nn.Module], tmp_path: Path) -> None:
    """What `ipex.llm.utils.load_low_precision_checkpoint` asks config.json for."""
    model = tiny_model("llama")
    ipex.gptq(model, loader(), 32, act_order=True, nsamples=2, pad_max_length=16, saved_dir=tmp_path / "new")
    found = json.loads((tmp_path / "new/config.json").read_text())
    assert found["quantization_config"].items() >= {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False,
    }.items()  # fmt: skip
    assert found["architectures"] == ["LlamaForCausalLM"]


def test_settings_arrive(tiny_model: Callable[[str], nn.Module], tmp_path: Path) -> None:
    model = ipex.gptq(
        tiny_model("llama"), loader(8, 20), 16, percdamp=0.2, nsamples=5, pad_max_length=12,
        scale_dtype=torch.bfloat16, save_dir=tmp_path,
    )  # fmt: skip
    state = torch.load(tmp_path / "gptq_checkpoint_g16.pt", weights_only=True)
    assert {t.dtype for name, t in state.items() if name.endswith(".scales")} == {torch.bfloat16}
    config = model.quantization_report.config
    got = (config.group_size, config.damp_percent, config.num_samples, config.seq_len, config.sym)
    assert got == (16, 0.2, 5, 12, False)


def test_windows() -> None:
    rows: list[Any] = [
        torch.arange(10).unsqueeze(0),
        {
            "input_ids": torch.arange(20, 26).unsqueeze(0),
            "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
        },
        (torch.arange(30, 34).unsqueeze(0),),
    ]
    any_length = windows(rows, 3, 5, full=False)
    assert [len(row) for row in any_length] == [5, 4, 4]
    assert torch.equal(any_length[0], torch.arange(5) + any_length[0][0])
    assert any_length[1].tolist() == [20, 21, 22, 23]
    assert [len(row) for row in windows(rows, 3, 5, full=True)] == [5]
    assert all(torch.equal(a, b) for a, b in zip(any_length, windows(rows, 3, 5, full=False), strict=True))
    with pytest.raises(CalibrationError, match="no sample of 11 tokens"):
        windows(rows, 3, 11, full=True)
    with pytest.raises(CalibrationError, match="sample 0 is a text"):
        windows(["once upon a time"], 1, 4, full=False)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"wbits": 8}, "wbits=8"),
    ({"group_size": 48}, "group_size=48"),
    ({"compression_dtype": torch.int8}, "compression_dtype=torch.int8"),
    ({"compression_dim": 0}, "compression_dim=0"),
    ({"percdamp": 2.0}, "damp_percent"),
    ({"scale_dtype": torch.int8}, "scale_dtype"),
]


@pytest.mark.parametrize(
    ("wrong", "told"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_it_refuses(
    wrong: dict[str, Any], told: str, tiny_model: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        ipex.gptq(tiny_model("llama"), loader(), save_dir=tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_another_models_folder_is_left_alone(tiny_model: Callable[[str], nn.Module], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"holds other weights: \['model.safetensors'\]"):
        ipex.gptq(tiny_model("llama"), loader(), 32, save_dir=tmp_path)
