"""Whatever is wrong with what comes in: one error of ours that names it, and nothing at the target."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_models import TINY_ARCHITECTURES, VOCABULARY
from woq import (
    AutoModelForCausalLM,
    GPTQConfig,
    QuantConfig,
    RtnConfig,
    WoqError,
    config_from_dict,
    quantize_folder,
    save_pretrained,
)
from woq.errors import CalibrationError, CheckpointError, ConfigError, QuantizationError
from woq.progress import Progress

QUIET = Progress()
RTN = RtnConfig(group_size=32)
GPTQ = GPTQConfig(group_size=32, num_samples=2, seq_len=16)
WEIGHT = "model.layers.1.mlp.up_proj.weight"


def rows() -> list[Tensor]:
    return [torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a float model and the same model quantized."""
    folder = tmp_path_factory.mktemp("saved")
    TINY_ARCHITECTURES["llama"]().save_pretrained(folder / "float")
    quantize_folder(folder / "float", folder / "q", RTN, progress=QUIET)
    return folder


@pytest.fixture
def source(saved: Path, tmp_path: Path) -> Path:
    """A float model of one's own to damage."""
    return Path(shutil.copytree(saved / "float", tmp_path / "float"))


@pytest.fixture
def quantized(saved: Path, tmp_path: Path) -> Path:
    """A quantized one."""
    return Path(shutil.copytree(saved / "q", tmp_path / "quantized"))


def refuse(
    source: Path, config: QuantConfig, kind: type[WoqError], message: str, data: Any = None, **options: Any
) -> None:
    """`quantize_folder` raises `kind`, and leaves nothing that could be taken for a model."""
    target = source.parent / "target"
    with pytest.raises(kind, match=message):
        quantize_folder(source, target, config, data, progress=QUIET, **options)
    assert not target.exists()


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def truncate(folder: Path, share: float) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, int(file.stat().st_size * share))


# --- float models ------------------------------------------------------------------------------------------------


def test_missing_folder(tmp_path: Path) -> None:
    for load in (
        lambda: quantize_folder(tmp_path / "gone", tmp_path / "target", RTN, progress=QUIET),
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "gone"),
        lambda: AutoModelForCausalLM.from_pretrained("./gone"),
    ):
        with pytest.raises(CheckpointError, match=r"gone is no folder\n.*holds config\.json"):
            load()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file is no folder"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "file")


CONFIGS: dict[str, tuple[str | None, str]] = {
    "missing": (None, r"config\.json does not exist"),
    "cut": ('{"model_type": "lla', r"config\.json is not valid JSON"),
    "list": ("[]", r"config\.json holds a list"),
    "empty object": ("{}", r"config\.json describes no model"),
    "wrong field": ('{"model_type": "llama", "hidden_size": "x"}', r"describes no model.*hidden_size"),
    "unknown type": ('{"model_type": "no_such_model"}', r"config\.json describes no model.*no_such_model"),
}


@pytest.mark.parametrize(("content", "message"), CONFIGS.values(), ids=CONFIGS)
def test_config_json(content: str | None, message: str, source: Path) -> None:
    if content is None:
        (source / "config.json").unlink()
    else:
        (source / "config.json").write_text(content)
    refuse(source, RTN, CheckpointError, message)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(source)


@pytest.mark.parametrize("offload", ["never", "always"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.7])
def test_truncated_float_weights(share: float, offload: str, source: Path) -> None:
    truncate(source, share)
    refuse(source, RTN, CheckpointError, r"float.*cannot be loaded: ", offload=offload)
    with pytest.raises(CheckpointError, match=r"cannot be loaded|damaged"):
        AutoModelForCausalLM.from_pretrained(source)


def test_no_weights(source: Path) -> None:
    (source / "model.safetensors").unlink()
    refuse(source, RTN, CheckpointError, r"float cannot be loaded: .*model\.safetensors")


@pytest.mark.parametrize("offload", ["never", "always"])
@pytest.mark.parametrize("name", [WEIGHT, "model.norm.weight", "lm_head.weight"])
def test_missing_tensor(name: str, offload: str, source: Path) -> None:
    """transformers would warn, and quantize random weights."""
    edit(source, lambda t: t.pop(name))
    refuse(
        source, RTN, CheckpointError, rf"float does not fit Llama.*: no tensor for {name}", offload=offload
    )
    with pytest.raises(CheckpointError, match="no tensor for"):
        AutoModelForCausalLM.from_pretrained(source)


def test_tensor_of_another_shape(source: Path) -> None:
    edit(source, lambda t: t.update({WEIGHT: t[WEIGHT][:10].clone()}))
    refuse(source, RTN, CheckpointError, rf"{WEIGHT} is \[10, 64\], expected \[96, 64\]")


def test_damaged_tokenizer(source: Path) -> None:
    (source / "tokenizer.json").write_text("{")
    refuse(source, RTN, CheckpointError, r"the tokenizer in .*float cannot be loaded")


def test_pickles_are_not_read(source: Path) -> None:
    """Even beside a good config: a pickle may run anything."""
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    refuse(source, RTN, CheckpointError, "only safetensors are read")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("config", [RTN, GPTQ], ids=["rtn", "gptq"])
def test_weights_that_are_no_numbers(config: QuantConfig, value: float, source: Path) -> None:
    edit(source, lambda t: t[WEIGHT][3].fill_(value))
    kinds = QuantizationError if config is RTN else (QuantizationError, CalibrationError)
    target = source.parent / "target"
    with pytest.raises(kinds, match=r"^model\.layers\.1: .*(NaN or infinite|not finite)"):
        quantize_folder(source, target, config, rows(), progress=QUIET)
    assert not target.exists()


# --- calibration -------------------------------------------------------------------------------------------------

DATA: dict[str, tuple[Any, str]] = {
    "empty": ([], "holds no text and no token ids"),
    "empty row": ([torch.zeros(1, 0, dtype=torch.int64)], "sample 0 is empty|no token ids"),
    "NaN": ([torch.tensor([[1.0, float("nan")]])], r"sample 0|torch\.float32"),
    "no such id": ([torch.tensor([[3, 4], [5, 1000]])], "sample 1: token id 1000 at position 1"),
    "negative id": ([torch.tensor([[3, -1]])], "sample 0: token id -1 at position 1"),
    "text, no tokenizer": (["some text"], "texts need a tokenizer"),
    "missing file": ("nowhere/data.jsonl", "data.jsonl"),
}


@pytest.mark.parametrize(("data", "message"), DATA.values(), ids=DATA)
def test_calibration_data(data: Any, message: str, source: Path) -> None:
    refuse(source, GPTQ, CalibrationError, message, data)
    assert not (source.parent / "target.partial").exists()  # found before anything was begun


def test_a_sample_that_makes_infinities_is_named(source: Path) -> None:
    """One token's embedding is damaged: the batch that holds it is the one that is named."""
    edit(source, lambda t: t["model.embed_tokens.weight"][7].fill_(float("nan")))
    data = rows()
    data[0][data[0] == 7] = 8
    config = GPTQConfig(group_size=32, num_samples=2, seq_len=16, batch_size=1)
    quantize_folder(source, source.parent / "good", config, data, progress=QUIET)
    data[0][1, 4] = 7
    refuse(source, config, CalibrationError, "calibration batch 1: the embeddings are not finite", data)


def test_overflow_inside_names_block_and_layer(source: Path) -> None:
    edit(source, lambda t: t["model.layers.1.post_attention_layernorm.weight"].fill_(3e38))
    refuse(source, GPTQ, CalibrationError, r"^model\.layers\.1: .*(NaN or infinite|not finite)", rows())


# --- configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"quant_method": "rtn", "bits": 9}, "bits"),
        ({"quant_method": "rtn", "bist": 4}, "bist"),
        ({"quant_method": "nope"}, "nope"),
        ({"quant_method": "gptq", "group_size": 0}, "group_size"),
    ],
)
def test_configs(data: dict[str, Any], message: str, source: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict(data)
    with pytest.raises(ConfigError, match=message):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=data)


def test_plan_errors_come_before_anything_is_written(source: Path) -> None:
    refuse(source, RtnConfig(group_size=64), ConfigError, "does not divide in_features of 2 layers")
    refuse(source, RtnConfig(group_size=32, ignore=("mlp",), min_coverage=0.9), QuantizationError, "only ")
    refuse(source, RtnConfig(group_size=32, blocks="model.h"), QuantizationError, r"blocks='model\.h'")
    assert not (source.parent / "target.partial").exists()


# --- quantized folders -------------------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj"
DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing qzeros": (lambda t: t.pop(f"{Q}.qzeros"), rf"layer '{Q}': \['qzeros'\] missing"),
    "short qweight": (
        lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"][:4].clone()}),
        rf"layer '{Q}': qweight is torch\.int32 \[4, 64\], expected",
    ),
    "float qweight": (
        lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].float()}),
        rf"layer '{Q}': qweight is torch\.float32",
    ),
    "integer scales": (
        lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"].int()}),
        rf"layer '{Q}': scales are I32",
    ),
    "missing norm": (lambda t: t.pop("model.norm.weight"), r"no tensor for \['model\.norm\.weight'\]"),
    "missing layer": (
        lambda t: [t.pop(n) for n in list(t) if n.startswith(Q)],
        rf"no tensor for \['{Q}\.weight'\]",
    ),
    "short norm": (
        lambda t: t.update({"model.norm.weight": torch.ones(3)}),
        r"model\.norm\.weight is \[3\], LlamaForCausalLM wants \[64\]",
    ),
    "integer norm": (
        lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int64)}),
        r"model\.norm\.weight is I64, expected one of",
    ),
    "unknown tensor": (lambda t: t.update({"extra": torch.ones(3)}), "tensor 'extra' is not in Llama"),
    "unknown layer": (
        lambda t: t.update({"extra.qweight": torch.ones(3, dtype=torch.int32)}),
        "layer 'extra' is no linear of Llama",
    ),
    "unexpected bias": (lambda t: t.update({f"{Q}.bias": torch.ones(64)}), f"layer '{Q}': a bias stored"),
    "nothing quantized": (
        lambda t: [t.pop(n) for n in list(t) if n.endswith("qweight")],
        "no quantized layer is|is not in Llama",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_tensors(damage: Callable[[dict[str, Tensor]], Any], message: str, quantized: Path) -> None:
    edit(quantized, damage)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(quantized, device_map="cpu")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_quantized_weights(share: float, quantized: Path) -> None:
    truncate(quantized, share)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged: .*\n.*truncated"):
        AutoModelForCausalLM.from_pretrained(quantized, device_map="cpu")


def test_index_that_leaves_the_folder(quantized: Path) -> None:
    shutil.move(quantized / "model.safetensors", quantized.parent / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (quantized / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="names a file outside the folder"):
        AutoModelForCausalLM.from_pretrained(quantized, device_map="cpu")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "quantization_config"),
        ("gptq", r"quantization_config is 'gptq', expected an object"),
        ([], r"quantization_config is \[\], expected an object"),
        ({"quant_method": "awq"}, "group_size is None, expected an int"),
        ({"quant_method": "quark"}, "quant_method 'quark' is not known"),
        ({"quant_method": "gptq", "bits": 4}, "group_size is None"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 32}, "qweight is"),
    ],
)
def test_quantization_config(value: Any, message: str, quantized: Path) -> None:
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": value}))
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(quantized, device_map="cpu")


# --- a full disk -------------------------------------------------------------------------------------------------


def test_full_disk_while_quantizing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second block does not fit; with room again, resuming ends as an unbroken run does."""
    from woq.writer import save_file as real

    def filling(tensors: Any, file: Path, **options: Any) -> None:
        if "block-00001" in str(file):
            Path(file).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(tensors, file, **options)

    with monkeypatch.context() as patch:
        patch.setattr("woq.writer.save_file", filling)
        refuse(source, RTN, CheckpointError, r"block-00001\.safetensors: the disk is full\n.*resume")
    left = sorted(p.name for p in (source.parent / "target.partial").iterdir())
    assert left == ["block-00000.safetensors", "manifest.json"]
    quantize_folder(source, source.parent / "target", RTN, resume=True, progress=QUIET)
    quantize_folder(source, source.parent / "unbroken", RTN, progress=QUIET)
    one, other = (source.parent / name / "model.safetensors" for name in ("target", "unbroken"))
    assert one.read_bytes() == other.read_bytes()


def test_full_disk_while_saving(quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(quantized, device_map="cpu")
    before = {p.name: p.read_bytes() for p in quantized.iterdir()}

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for target in (tmp_path / "new", quantized):
        with monkeypatch.context() as patch:
            patch.setattr("woq.writer.save_file", full)
            with pytest.raises(CheckpointError, match="the disk is full"):
                save_pretrained(model, target)
    assert not (tmp_path / "new").exists()
    assert {p.name: p.read_bytes() for p in quantized.iterdir()} == before
    assert not list(tmp_path.glob("*.partial"))
    save_pretrained(model, tmp_path / "new")  # nothing is in the way of the next attempt
    assert (tmp_path / "new" / "model.safetensors").exists()


def test_a_folder_that_may_not_be_written(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", denied)
    refuse(source, RTN, CheckpointError, r"cannot write .*target\.partial: .*Permission denied")
