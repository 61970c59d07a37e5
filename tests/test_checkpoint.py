"""What a folder says of itself is checked before it is believed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from woq.checkpoint import FolderFormat, quantization_dict
from woq.configs import GPTQConfig, RtnConfig
from woq.errors import CheckpointError
from woq.tensor_files import TensorFolder, read_json
from woq.weights import GPTQ_V1, GPTQ_V2, Layout, QuantizedWeight, WeightSpec

WHERE = Path("config.json")
STANDARD: dict[str, Any] = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "desc_act": False,
}
OWN = {
    "version": 1,
    "packing": "inc_plain",
    "zero_offset": 0,
    "compression_dtype": "int16",
    "compression_dim": 0,
}


def spec(**fields: Any) -> WeightSpec:
    return WeightSpec(
        **{"in_features": 64, "out_features": 32, "bits": 4, "group_size": 32, "sym": True, **fields}
    )


# --- metadata ----------------------------------------------------------------------------------------------------


def test_rules_for_layers_that_differ() -> None:
    config = GPTQConfig(group_size=32, overrides={r".*v": {"bits": 8}})
    specs = {
        "a.q": spec(layout=GPTQ_V1),
        "a.v": spec(bits=8, layout=GPTQ_V1),
        "a.o": spec(group_size=64, layout=GPTQ_V1),
    }
    made = quantization_dict(config, specs, {"a.skipped": "why"}, untied_head=False, own_names=False)
    assert made["dynamic"] == {
        r"+:^a\.v$": {"bits": 8, "group_size": 32, "sym": True},
        r"+:^a\.o$": {"bits": 4, "group_size": -1, "sym": True},
        r"-:^a\.skipped$": {},
    }
    read = FolderFormat.parse(json.loads(json.dumps(made)), WHERE)
    assert read.layout == GPTQ_V1
    assert read.config == config
    assert [read.settings(name) for name in specs] == [
        (4, 32, True, "int"),
        (8, 32, True, "int"),
        (4, -1, True, "int"),
    ]


NAMES = ["a.up", "a.down", "b.up", "b.up.0", "c+d"]
RULES = [
    "+:^a\\.up$",
    "^a\\.up$",
    "^a\\.down$",
    "+:.*up",
    "-:a.*",
    "+:^b\\.up$",
    "+:b",
    "+:^c\\+d$",
    "+:^a.up$",
    "+:c",
]


@example(["+:^a\\.up$", "^a\\.up$", "+:b"])
@given(st.lists(st.sampled_from(RULES), unique=True))
def test_the_first_matching_rule_holds(rules: list[str]) -> None:
    dynamic = {
        rule: {"bits": 2 + place % 7, "group_size": 32 * (place + 1)} for place, rule in enumerate(rules)
    }
    read = FolderFormat.parse({**STANDARD, "dynamic": dynamic}, WHERE)
    for name in NAMES:
        matching = [r for r in rules if not r.startswith("-:") and re.match(r.removeprefix("+:"), name)]
        expected = dynamic[matching[0]] if matching else STANDARD
        assert read.settings(name)[:2] == (expected["bits"], expected["group_size"])


def test_own_layouts_come_back() -> None:
    for packing, word, dim in (("inc_plain", "int8", 0), ("inc_plain", "int64", 1)):
        layout = Layout(packing, 0, getattr(torch, word), dim)  # type: ignore[arg-type]
        config = RtnConfig(compression_dtype=word, compression_dim=dim, packing=packing)  # type: ignore[arg-type]
        made = quantization_dict(config, {"a": spec(layout=layout)}, {}, untied_head=False, own_names=False)
        assert made["quant_method"] == "woq"
        assert FolderFormat.parse(made, WHERE).layout == layout


MALFORMED: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "awq"}, "quant_method 'awq' with checkpoint_format 'gptq' is not known"),
    ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not known"),
    ({"bits": "4"}, r"quantization_config\.bits is '4', expected an int"),
    ({"group_size": None}, r"group_size is None, expected an int"),
    ({"dynamic": ["x"]}, "dynamic is malformed"),
    ({"dynamic": {"+:(": {}}}, "dynamic is malformed"),
    ({"dynamic": {"+:a": {"bits": "8"}}}, "dynamic is malformed.*must be integers"),
    ({"dynamic": {"+:a": None}}, "dynamic is malformed"),
    ({"woq": "x"}, r"quantization_config\.woq is malformed"),
    ({"woq": {"config": 3}}, r"quantization_config\.woq is malformed"),
    ({"quant_method": "woq", "checkpoint_format": "woq_inc_plain"}, "is not known"),
    ({"checkpoint_format": "woq_gptq", "woq": {"version": 1}}, r"quantization_config\.woq is malformed"),
    ({"checkpoint_format": "woq_gptq", "woq": {**OWN, "version": 3}}, "version 3 is newer than 2"),
    ({"checkpoint_format": "woq_gptq", "woq": {**OWN, "version": "x"}}, "malformed"),
    ({"checkpoint_format": "woq_gptq", "woq": {**OWN, "packing": "planar"}}, "layout that does not exist"),
    ({"checkpoint_format": "woq_gptq", "woq": {**OWN, "compression_dim": 2}}, "layout that does not exist"),
    ({"checkpoint_format": "woq_gptq", "woq": {**OWN, "compression_dtype": "int4"}}, "malformed.*int4"),
    ({"checkpoint_format": "woq_gptq", "woq": {**OWN, "zero_offset": 1}}, "layout that does not exist"),
]


@pytest.mark.parametrize(("changes", "message"), MALFORMED)
def test_malformed_metadata(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^config.json: .*{message}"):
        FolderFormat.parse({**STANDARD, **changes}, WHERE)


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_standard_forms(form: str) -> None:
    read = FolderFormat.parse({**STANDARD, "checkpoint_format": form}, WHERE)
    assert read.layout == (GPTQ_V1 if form == "gptq" else GPTQ_V2)
    assert read.config is None


# --- files -------------------------------------------------------------------------------------------------------


def test_json(tmp_path: Path) -> None:
    for content, message in (
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "holds a list"),
    ):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"x\.json.*{message}"):
            read_json(tmp_path / "x.json")
    with pytest.raises(CheckpointError, match=r"y\.json does not exist"):
        read_json(tmp_path / "y.json")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ""])
def test_an_index_may_not_leave_the_folder(name: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError):
        TensorFolder(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 3}}, {"weight_map": None}])
def test_malformed_index(index: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="weight_map is missing or malformed"):
        TensorFolder(tmp_path)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "gone.safetensors"}})
    )
    with pytest.raises(CheckpointError, match=r"gone\.safetensors does not exist"):
        TensorFolder(tmp_path)


def test_a_header_that_claims_too_much_allocates_nothing(tmp_path: Path) -> None:
    """A terabyte in the header, eight bytes in the file."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"12345678")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        TensorFolder(tmp_path)


# --- a layer's tensors -------------------------------------------------------------------------------------------


def stored(tmp_path: Path, desc_act: bool = True, **changes: torch.Tensor | None) -> TensorFolder:
    """A folder with the one layer "a.q", some of its tensors changed or left out."""
    made = spec(desc_act=desc_act, layout=GPTQ_V1)
    codes, zeros = torch.randint(0, 16, (32, 64)), torch.full((32, 2), 8)
    g_idx = (torch.randperm(64) // 32).to(torch.int32) if desc_act else None
    weight = QuantizedWeight(
        made, codes.to(torch.uint8), torch.rand(32, 2).half(), zeros.to(torch.uint8), g_idx
    )
    tensors = {**weight.pack().tensors(), **changes}
    save_file({f"a.q.{n}": t for n, t in tensors.items() if t is not None}, tmp_path / "model.safetensors")
    return TensorFolder(tmp_path)


def read(folder: TensorFolder) -> WeightSpec:
    form = FolderFormat.parse({**STANDARD, "checkpoint_format": "gptq"}, WHERE)
    [(name, headers)] = folder.layers()
    return folder.packed(name, form.spec(name, 64, 32, headers), headers).spec


def test_g_idx_decides_about_desc_act(tmp_path: Path) -> None:
    assert read(stored(tmp_path)).desc_act
    assert not read(stored(tmp_path, desc_act=False)).desc_act
    assert not read(stored(tmp_path, g_idx=torch.zeros(64, dtype=torch.int32))).desc_act
    assert not read(stored(tmp_path, g_idx=None)).desc_act


BAD: list[tuple[dict[str, torch.Tensor | None], str]] = [
    ({"g_idx": torch.full((64,), 2, dtype=torch.int32)}, "g_idx names groups 2 to 2 of 2"),
    ({"g_idx": torch.full((64,), -1, dtype=torch.int32)}, "g_idx names groups -1 to -1 of 2"),
    ({"g_idx": torch.ones(64, dtype=torch.int32)}, "g_idx gives groups other sizes than 32"),
    ({"g_idx": torch.zeros(3, dtype=torch.int32)}, r"g_idx is torch\.int32 \[3\], expected"),
    ({"g_idx": torch.arange(64) // 32}, r"g_idx is torch\.int64"),
    ({"g_idx": torch.arange(64).flip(0) // 32}, r"g_idx is torch\.int64"),
    ({"g_idx": torch.rand(64)}, r"g_idx is torch\.float32"),
    (
        {"qweight": torch.zeros(8, 31, dtype=torch.int32)},
        r"qweight is torch\.int32 \[8, 31\], expected .*\[8, 32\]",
    ),
    ({"qweight": torch.zeros(8, 32)}, r"qweight is torch\.float32"),
    ({"qzeros": None}, r"\['qzeros'\] missing"),
    ({"scales": None}, r"\['scales'\] missing"),
    ({"scales": torch.zeros(2, 32, dtype=torch.int32)}, "scales are I32, expected a float"),
    ({"scales": torch.full((2, 32), float("nan")).half()}, "scales hold NaN or infinity"),
    ({"scales": torch.zeros(3, 32).half()}, r"scales is torch\.float16 \[3, 32\]"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_tensors_that_do_not_fit(
    changes: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=rf"^layer 'a\.q': .*{message}"):
        read(stored(tmp_path, **changes))


def test_settings_out_of_range(tmp_path: Path) -> None:
    folder = stored(tmp_path)
    [(name, headers)] = folder.layers()
    for changes in ({"bits": 9}, {"bits": 1}, {"group_size": 0}, {"group_size": -2}):
        form = FolderFormat.parse({**STANDARD, **changes}, WHERE)
        with pytest.raises(CheckpointError, match=r"layer 'a\.q': bits .* out of range"):
            form.spec(name, 64, 32, headers)
