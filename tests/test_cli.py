"""The commands end to end on a real small model, and what they do with mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file
from typer.testing import CliRunner

from woq import CheckpointError, ConfigError, preset
from woq.cli import app, build_config
from woq.configs import CONFIGS, ConfigWarning

GROUP_32 = ["--group-size", "32", "--set", "on_ragged_group=smaller"]  # its down_proj has 172 inputs


def call(*arguments: object) -> Result:
    """Run a command; stdout and stderr apart."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def flat(text: str) -> str:
    """Without the line breaks that a table of 80 columns brings."""
    return " ".join(text.split())


@pytest.fixture(scope="module")
def quantized(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("cli") / "quantized"
    result = call("quantize", stories260k, target, "--method", "rtn", *GROUP_32)
    assert result.exit_code == 0, result.stderr
    assert "100.0% of the blocks' weights" in flat(result.stdout)
    assert "woq eval" in result.stdout  # the next command
    return target


def test_quantize_writes_a_folder_and_a_row_a_layer(quantized: Path) -> None:
    rows = (quantized / "quantization_layers.csv").read_text(encoding="utf-8").splitlines()
    assert rows[0].startswith("layer,bits,group_size,sym,loss")
    assert len(rows) == 1 + 35


def test_quantize_refuses_to_replace_unless_told(stories260k: Path, quantized: Path) -> None:
    again = ("quantize", stories260k, quantized, "--method", "rtn", *GROUP_32)
    refused = call(*again)
    assert refused.exit_code == 2
    assert "hint: " in refused.stderr
    assert call(*again, "--overwrite").exit_code == 0


def test_inspect_a_quantized_folder(quantized: Path) -> None:
    facts = json.loads(call("inspect", quantized, "--json").stdout)
    assert (facts["quant_method"], facts["algorithm"], facts["checkpoint_format"]) == ("gptq", "rtn", "gptq")
    assert [(kind["layers"], kind["bits"], kind["group"]) for kind in facts["kinds"]] == [
        (30, 4, 32),
        (5, 4, 4),
    ]
    # 4 bits, plus 16 + 4 bits a group of 32 (or 4), plus g_idx and what padding 172 to 192 costs
    assert 5 < facts["bits_per_weight"] < 7
    assert any("no multiple of 32" in oddity for oddity in facts["oddities"])
    assert "model.embed_tokens.weight" in facts["floats"]
    text = flat(call("inspect", quantized).stdout)
    assert "30 4 32 sym float16 trivial" in text


def test_inspect_counts_every_byte(quantized: Path) -> None:
    """Quantized and float tensors together are the file, but for its header."""
    facts = json.loads(call("inspect", quantized, "--json").stdout)
    file = quantized / "model.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    assert facts["bytes"] == file.stat().st_size - header


def test_inspect_a_float_folder(stories260k: Path) -> None:
    facts = json.loads(call("inspect", stories260k, "--json").stdout)
    assert facts["quant_method"] is None and facts["kinds"] == [] and facts["bits_per_weight"] is None
    assert any("does not divide in_features [64, 172]" in oddity for oddity in facts["oddities"])
    assert "none: a float checkpoint" in flat(call("inspect", stories260k).stdout)


def test_inspect_tells_the_oddities(stories260k: Path, tmp_path: Path) -> None:
    target = tmp_path / "five"
    options = ("--bits", 5, "--group-size", -1, "--asym", "--set", 'overrides={".*down_proj": {"bits": 6}}')
    assert call("quantize", stories260k, target, "--method", "rtn", *options).exit_code == 0
    facts = json.loads(call("inspect", target, "--json").stdout)
    assert facts["quant_method"] == "woq"
    told = " ".join(facts["oddities"])
    assert "[5, 6] bits are no GPTQ widths" in told and "bits are mixed [5, 6]" in told


def test_eval_text_against_the_original(stories260k: Path, quantized: Path, shared_dir: Path) -> None:
    text = shared_dir / "data/text/tinystories-valid.txt"
    options = ("--text", text, "--seq-len", 128, "--max-windows", 4, "--dtype", "float32", "--json")
    result = call("eval", quantized, "--reference", stories260k, *options)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["windows"] == "4 x 128 tokens"
    assert 0 < found["KL_divergence"] < 0.3
    assert 0.7 < found["top-1_agreement"] < 1
    assert found["reference_perplexity"] < found["perplexity"] < 2 * found["reference_perplexity"]
    alone = json.loads(call("eval", quantized, *options).stdout)
    assert alone["perplexity"] == pytest.approx(found["perplexity"], abs=2e-4)
    assert "KL_divergence" not in alone


def test_eval_of_a_model_against_itself_is_zero(stories260k: Path, tmp_path: Path) -> None:
    tokens = torch.randint(3, 500, (3, 32), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    save_file({"test": tokens, "other": tokens + 1}, tmp_path / "tokens.safetensors")
    source = tmp_path / "tokens.safetensors"
    result = call("eval", stories260k, "--reference", stories260k, "--tokens", f"{source}:test", "--json")
    found = json.loads(result.stdout)
    assert (found["KL_divergence"], found["top-1_agreement"]) == (0, 1)
    unnamed = call("eval", stories260k, "--tokens", source)
    assert unnamed.exit_code == 2
    assert "['other', 'test']" in unnamed.stderr


def test_doctor_names_every_device_and_layer() -> None:
    found = json.loads(call("doctor", "--json").stdout)
    assert set(found["devices"]) == {"cuda", "xpu", "cpu"}
    assert found["versions"]["torch"] == torch.__version__
    assert any(choice["backend"] in ("cpu", "torch") for choice in found["choices"])
    for choice in found["choices"]:  # whatever runs on the reference has been refused by somebody
        assert choice["backend"] != "reference" or choice["refused"]
    text = flat(call("doctor").stdout)
    assert "4 bit, group 128, act-order" in text and "quantizes on" in text


def test_doctor_says_what_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("woq.native.why_not", lambda name: f"no compiler for the {name} kernels")
    found = json.loads(call("doctor", "--json").stdout)
    on_cpu = {(c["layer"], c["dtype"]): c["refused"] for c in found["choices"] if c["device"] == "cpu"}
    assert on_cpu["4 bit, group 128", "float32"]["cpu"] == "no compiler for the cpu kernels"
    assert "it would with dtype bfloat16" in on_cpu["4 bit, group 128", "float32"]["torch"]
    assert "it would with group_size -1" in on_cpu["8 bit, group 128", "bfloat16"]["torch"]


def test_doctor_survives_a_wrong_target_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INC_TARGET_DEVICE", "tpu")
    found = json.loads(call("doctor", "--json").stdout)
    assert found["quantizes_on"].startswith("nowhere: INC_TARGET_DEVICE='tpu'")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bits", 9), "GPTQConfig.bits = 9; allowed: integer >= 2 and <= 8"),
        (("--set", "bitz=4"), "GPTQConfig has no field 'bitz'"),
        (("--set", "bits"), "--set bits: expected field=value"),
        (("--method", "magic"), "quant_method = 'magic'"),
        (("--preset", "W1A16"), "no preset 'W1A16'"),
        (("--method", "rtn", "--num-samples", 4), "RtnConfig has no field 'num_samples'"),
        (("--method", "rtn"), "group_size does not divide in_features"),
        (("--config", "missing.json"), "cannot read missing.json"),
        (("--dtype", "int3"), "dtype='int3'"),
    ],
)  # fmt: skip
def test_mistakes_end_in_a_message_and_2(
    stories260k: Path, tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    result = call("quantize", stories260k, tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert f"error: {message}" in flat(result.stderr)
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []  # nothing half-written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "nowhere/at/all"), "nowhere/at/all is no folder"),
        (("eval", "{model}"), "pass a text file or a token file"),
        (("eval", "{model}", "--text", "missing.txt"), "cannot read missing.txt"),
        (("eval", "{model}", "--tokens", "missing.safetensors"), "cannot read token file missing.safetensors"),
        (("eval", "{model}", "--tokens", "t.safetensors", "--seq-len", 8), "a token file comes in windows: seq_len is for text"),
    ],
)  # fmt: skip
def test_mistakes_of_the_other_commands(
    stories260k: Path, arguments: tuple[object, ...], message: str
) -> None:
    result = call(*(str(argument).format(model=stories260k) for argument in arguments))
    assert result.exit_code == 2
    assert f"error: {message}" in flat(result.stderr)


def test_a_hint_has_a_line_of_its_own(stories260k: Path, tmp_path: Path) -> None:
    result = call("quantize", stories260k, tmp_path / "out", "--set", "bitz=4")
    error, hint = result.stderr.splitlines()
    assert error.startswith("error: ") and hint.startswith("hint: did you mean bits")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        CliRunner().invoke(app, ["--debug", "inspect", str(tmp_path)], catch_exceptions=False)


def test_a_damaged_folder_is_one_error(quantized: Path, tmp_path: Path) -> None:
    for file in quantized.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = call("inspect", tmp_path)
    assert result.exit_code == 2
    assert "is damaged" in flat(result.stderr)


def test_options_leave_the_configs_own_defaults() -> None:
    for method, cls in CONFIGS.items():
        assert build_config(method, None, None, {"bits": None}, []) == cls()
    assert build_config(None, None, None, {}, []).quant_method == "gptq"


def test_file_then_options_then_assignments(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"quant_method": "rtn", "bits": 3, "group_size": 64, "sym": false}', encoding="utf-8")
    assert build_config(None, None, file, {}, []).to_diff_dict() == {
        "quant_method": "rtn", "bits": 3, "group_size": 64, "sym": False,
    }  # fmt: skip
    assert build_config(None, None, file, {"bits": 2}, ["group_size=-1"]).to_diff_dict() == {
        "quant_method": "rtn", "bits": 2, "group_size": -1, "sym": False,
    }  # fmt: skip
    assert build_config("gptq", None, file, {}, []).quant_method == "gptq"
    assert build_config("rtn", "w8a16", None, {}, ['ignore=["re:.*down_proj"]']) == preset(
        "W8A16", "rtn", ignore=["re:.*down_proj"]
    )


def test_peers_names_are_taken_and_their_disagreement_refused() -> None:
    assert build_config("rtn", None, None, {}, ["wbits=3"]).bits == 3
    with pytest.raises(ConfigError):
        build_config("rtn", None, None, {"bits": 4}, ["wbits=3"])


@pytest.mark.filterwarnings("default::woq.configs.ConfigWarning")
def test_a_field_without_meaning_here_is_a_warning_on_stderr(stories260k: Path, tmp_path: Path) -> None:
    arguments = ("--method", "rtn", *GROUP_32, "--set", "use_cuda_fp16=true")
    result = call("quantize", stories260k, tmp_path / "out", *arguments)
    assert result.exit_code == 0, result.stderr
    assert "warning: " in result.stderr and "use_cuda_fp16" in result.stderr
    assert issubclass(ConfigWarning, UserWarning)
