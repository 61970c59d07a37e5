"""One layer at a time: what independent writers wrote is read back to the bit, and what we write is what they write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.interop import foreign_writers as foreign
from tests.interop.foreign_writers import Plain, random_plain
from woq.codebooks import VALUES
from woq.errors import CheckpointError
from woq.interop import TARGETS, load, reader_of
from woq.interop.base import Found, Layer, Summary, Writer
from woq.packing import WORD_BITS
from woq.tensor_files import TensorInfo
from woq.weights import GPTQ_V2, QuantizedWeight, WeightSpec

HERE = Path("config.json")


class Memory:
    """Tensors with the face of a `TensorFolder`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self.index = {
            n: TensorInfo(Path("x.safetensors"), _name(t), tuple(t.shape)) for n, t in tensors.items()
        }

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def packed(self, name: str, spec: WeightSpec, headers: Mapping[str, TensorInfo]) -> Any:
        from woq.tensor_files import TensorFolder

        return TensorFolder.packed(self, name, spec, headers)  # type: ignore[arg-type]


def _name(tensor: Tensor) -> str:
    letter = "F" if tensor.is_floating_point() else "I"
    return "BF16" if tensor.dtype == torch.bfloat16 else f"{letter}{tensor.element_size() * 8}"


def read(
    raw: dict[str, Any],
    tensors: Mapping[str, Tensor],
    shape: tuple[int, int],
    name: str = "a.q",
    where: Path = HERE,
) -> QuantizedWeight:
    """Layer `name` of a folder with this description."""
    reader = reader_of(Found(Path(), where, raw, (where,)))
    memory = Memory({f"{name}.{part}": tensor for part, tensor in tensors.items()})
    headers = reader.layers(memory.index)[name]
    return reader.read(Layer(name, *shape, headers, memory)).unpack()  # type: ignore[arg-type]


def assert_is(got: QuantizedWeight, plain: Plain) -> None:
    """Bit for bit."""
    assert torch.equal(got.codes.long(), plain.codes)
    assert torch.equal(got.zeros.long(), plain.zeros)
    assert torch.equal(got.scales, plain.scales)
    assert torch.equal(got.groups_of_inputs(), plain.g_idx)
    assert got.spec.sym == plain.sym
    assert torch.equal(got.dequantize(), plain.dequantize())


def ours(plain: Plain) -> QuantizedWeight:
    """The same numbers in our own form."""
    spec = WeightSpec(
        in_features=plain.codes.shape[1],
        out_features=plain.codes.shape[0],
        bits=plain.bits,
        group_size=plain.group_size,
        sym=plain.sym,
        desc_act=not plain.trivial,
        layout=GPTQ_V2,
    )
    g_idx = None if plain.trivial else plain.g_idx.to(torch.int32)
    return QuantizedWeight(
        spec, plain.codes.to(torch.uint8), plain.scales, plain.zeros.to(torch.uint8), g_idx
    )


def gptq_config(plain: Plain, form: str, **fields: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": plain.bits,
        "group_size": plain.group_size,
        "sym": plain.sym,
        "desc_act": not plain.trivial,
        "checkpoint_format": form,
        **fields,
    }


def awq_config(plain: Plain, version: str) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": plain.group_size,
        "version": version,
        "zero_point": True,
    }


def ct_config(plain: Plain, **weights: Any) -> dict[str, Any]:
    scheme = {
        "num_bits": plain.bits,
        "type": "int",
        "symmetric": plain.sym,
        "strategy": "group",
        "group_size": plain.group_size,
        **weights,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": None}},
    }


# --- reading: every format over bits, groups, zero points, order -------------------------------------------------

# name -> (bits, whether act-order can be told, description, tensors)
FORMS: dict[
    str, tuple[tuple[int, ...], bool, Callable[[Plain], dict[str, Any]], Callable[[Plain], dict[str, Tensor]]]
] = {
    "gptq": ((2, 3, 4, 8), True, lambda w: gptq_config(w, "gptq"), lambda w: foreign.gptq(w, 1)),
    "gptq_v2": ((2, 3, 4, 8), True, lambda w: gptq_config(w, "gptq_v2"), lambda w: foreign.gptq(w, 0)),
    "gptqmodel v1": (
        (2, 3, 4, 8),
        True,
        lambda w: gptq_config(w, "gptq", meta={"quantizer": ["gptqmodel:2.2.0"]}),
        foreign.gptqmodel_v1,
    ),
    "awq gemm": ((4,), False, lambda w: awq_config(w, "gemm"), foreign.awq_gemm),
    "awq gemv": ((4,), False, lambda w: awq_config(w, "GEMV"), foreign.awq_gemv),
    "awq gemv_fast": ((4,), False, lambda w: awq_config(w, "gemv_fast"), foreign.awq_gemv_fast),
    "compressed-tensors": ((2, 3, 4, 5, 6, 7, 8), True, ct_config, foreign.compressed_tensors),
    "compressed-tensors before 0.18": (
        (2, 3, 4, 5, 6, 7, 8),
        True,
        ct_config,
        lambda w: foreign.compressed_tensors(w, foreign.in_words),
    ),
}


def ar_config(plain: Plain, packing: str) -> dict[str, Any]:
    return {
        "quant_method": "auto-round",
        "packing_format": packing,
        "bits": plain.bits,
        "group_size": plain.group_size,
        "sym": plain.sym,
    }


def inc_config(plain: Plain) -> dict[str, Any]:
    own = {"compute_dtype": "fp32", "weight_dtype": "int4", "quant_lm_head": False}
    return {
        "quant_method": "rtn",
        "bits": plain.bits,
        "group_size": plain.group_size,
        "sym": plain.sym,
        **own,
    }


FORMS |= {
    "auto_round": ((2, 3, 4, 8), False, lambda w: ar_config(w, "auto_round"), lambda w: without(foreign.gptq(w, 0), "g_idx")),
    "auto_round:gptqmodel": ((2, 3, 4, 8), True, lambda w: ar_config(w, "auto_round:gptqmodel"), lambda w: foreign.gptq(w, 0)),
    "auto_round:auto_gptq": (
        (2, 3, 4, 8), False, lambda w: ar_config(w, "auto_round:auto_gptq"), foreign.auto_round_words_minus_one,
    ),
    "auto_round:auto_awq": ((4,), False, lambda w: ar_config(w, "auto_round:auto_awq"), foreign.awq_gemm),
    "inc optimum": ((2, 3, 4, 5, 6, 7, 8), True, inc_config, foreign.inc_optimum),
}  # fmt: skip


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    del tensors[name]
    return tensors


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_reads_what_an_independent_writer_wrote(form: str, data: st.DataObject) -> None:
    widths, ordered, config, tensors = FORMS[form]
    shape = (data.draw(st.sampled_from([32, 64, 96])), data.draw(st.sampled_from([64, 128, 192])))
    plain = random_plain(
        *shape,
        bits=data.draw(st.sampled_from(widths)),
        group_size=data.draw(st.sampled_from([32, 64, -1])),
        sym=data.draw(st.booleans()),
        act_order=ordered and data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 1000)),
    )
    assert_is(read(config(plain), tensors(plain), shape), plain)


def test_gptqmodel_v1_differs_from_v1_where_a_zero_point_is_0() -> None:
    """Else the test above would not tell the two apart."""
    plain = random_plain(32, 64, sym=False)
    assert not plain.zeros.all()
    assert not torch.equal(foreign.gptqmodel_v1(plain)["qzeros"], foreign.gptq(plain, 1)["qzeros"])


def test_llm_awq_is_gemv_fast_under_another_name() -> None:
    plain = random_plain(32, 128, group_size=64, sym=False)
    tensors = foreign.awq_gemv_fast(plain)
    tensors["scaled_zeros"] = tensors.pop("qzeros")
    config = {"quant_method": "awq", "backend": "llm-awq", "w_bit": 4, "q_group_size": 64}
    assert_is(read(config, tensors, (32, 128)), plain)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_inc_plain_layout(data: st.DataObject) -> None:
    """Words of every width along either dimension; the description stands in qconfig.json, by layer."""
    width, dim = data.draw(st.sampled_from([8, 16, 32, 64])), data.draw(st.sampled_from([0, 1]))
    bits, sym = data.draw(st.integers(2, 8)), data.draw(st.booleans())
    plain = random_plain(64, 96, bits=bits, group_size=32, sym=sym, seed=data.draw(st.integers(0, 99)))
    got = read_inc_torch(
        {"dtype": "int", "bits": bits, "group_size": 32}, foreign.inc_plain(plain, width, dim), (64, 96)
    )
    assert torch.equal(got.codes.long(), plain.codes) and torch.equal(got.zeros.long(), plain.zeros)
    assert torch.equal(got.dequantize(), plain.dequantize())


def read_inc_torch(
    values: dict[str, Any], tensors: dict[str, Tensor], shape: tuple[int, int]
) -> QuantizedWeight:
    raw = {"('a.q', 'Linear')": {"rtn": values}}
    return read(raw, tensors, shape, where=Path("qconfig.json"))


def test_inc_torch_knows_the_optimum_layout_by_its_shapes() -> None:
    plain = random_plain(64, 64, sym=False)
    assert_is(
        read_inc_torch({"dtype": "int4", "bits": 4, "group_size": 32}, foreign.inc_optimum(plain), (64, 64)),
        plain,
    )


# neural-compressor's numbering, as its own source documents it: the value of each signed code
INC_NF4 = dict(zip((7, 1, 2, 3, 4, 5, 6, 0, -8, -7, -6, -5, -4, -3, -2, -1), VALUES["nf4"], strict=True))
INC_FP4 = {0: 0.0, 1: 0.0625, 2: 8.0, 3: 12.0, 4: 4.0, 5: 6.0, 6: 2.0, 7: 3.0}
INC_FP4 |= {-7: -0.0625, -2: -8.0, -3: 0.0} | {-1: -3.0, -4: -4.0, -3: -6.0, -6: -8.0, -5: -12.0, -2: -2.0}
INC_E2M1 = {0: 0.0, 1: 0.0625, 2: 1.0, 3: 1.5, 4: 2.0, 5: 3.0, 6: 4.0, 7: 6.0}
INC_E2M1 |= {-7: -0.0625, -6: -1.0, -5: -1.5, -4: -2.0, -3: -3.0, -2: -4.0, -1: -6.0}


@pytest.mark.parametrize(
    ("name", "book"), [("nf4", INC_NF4), ("fp4", INC_FP4), ("fp4_e2m1_bnb", INC_FP4), ("fp4_e2m1", INC_E2M1)]
)
def test_inc_codebooks(name: str, book: dict[int, float]) -> None:
    signed = sorted(book)
    if name == "fp4_e2m1":  # its 0.0625 is no value of E2M1
        signed = [code for code in signed if abs(book[code]) != 0.0625]
    generator = torch.Generator().manual_seed(1)
    chosen = torch.tensor(signed)[torch.randint(0, len(signed), (32, 64), generator=generator)]
    scales = torch.rand(32, 2, generator=generator) + 0.5
    plain = Plain(4, 32, (chosen + 8) % 16, scales, torch.full((32, 2), 8), torch.arange(64) // 32)
    tensors = foreign.inc_plain(plain, 32, 1)  # codes less 8, modulo 16: the signed codes in their field
    got = read_inc_torch({"dtype": name, "bits": 4, "group_size": 32}, tensors, (32, 64))
    values = torch.tensor([[book[int(code)] for code in row] for row in chosen])
    torch.testing.assert_close(got.dequantize(), values * scales.repeat_interleave(32, 1), rtol=1e-6, atol=0)


def test_incs_0_0625_is_refused_in_e2m1() -> None:
    plain = Plain(
        4, 32, torch.full((32, 32), 9), torch.ones(32, 1), torch.full((32, 1), 8), torch.zeros(32).long()
    )
    with pytest.raises(CheckpointError, match=r"0\.0625 where the standard's E2M1 has 0\.5"):
        read_inc_torch(
            {"dtype": "fp4_e2m1", "bits": 4, "group_size": 32}, foreign.inc_plain(plain, 32, 1), (32, 32)
        )


def test_auto_round_settings_by_layer() -> None:
    plain = random_plain(32, 64, bits=8)
    config = {
        **ar_config(plain, "auto_round"),
        "bits": 4,
        "extra_config": {".*q": {"bits": 8}, "a.k": {"bits": 2}},
    }
    assert_is(read(config, foreign.gptq(plain, 0), (32, 64)), plain)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("packing", ["auto_round", "auto_round:auto_gptq"])
def test_auto_round_symmetric_constant_says_its_convention(packing: str, offset: int) -> None:
    plain = random_plain(32, 64)
    assert_is(read(ar_config(plain, packing), foreign.gptq(plain, offset), (32, 64)), plain)


# --- what folders claim and what is so ---------------------------------------------------------------------------


def test_sym_is_what_the_zero_points_say() -> None:
    plain = random_plain(32, 64, sym=False)
    for claims in ({"sym": True}, {"sym": None}):
        assert_is(read(gptq_config(plain, "gptq", **claims), foreign.gptq(plain, 1), (32, 64)), plain)
    missing = gptq_config(plain, "gptq")
    del missing["sym"]
    assert_is(read(missing, foreign.gptq(plain, 1), (32, 64)), plain)


@pytest.mark.parametrize("claim", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_desc_act_is_what_g_idx_says(claim: bool, act_order: bool) -> None:
    plain = random_plain(32, 64, act_order=act_order)
    assert_is(read(gptq_config(plain, "gptq", desc_act=claim), foreign.gptq(plain, 1), (32, 64)), plain)


def test_an_all_zero_g_idx_is_none() -> None:
    plain = random_plain(32, 64)
    tensors = {**foreign.gptq(plain, 1), "g_idx": torch.zeros(64, dtype=torch.int32)}
    assert_is(read(gptq_config(plain, "gptq", desc_act=True), tensors, (32, 64)), plain)


def test_legacy_descriptions() -> None:
    plain = random_plain(32, 64, sym=False)
    legacy = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": False}
    assert_is(read(legacy, foreign.gptq(plain, 1), (32, 64)), plain)
    old_awq = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    assert_is(read(old_awq, foreign.awq_gemm(plain), (32, 64)), plain)


# --- writing -----------------------------------------------------------------------------------------------------

WRITERS = {name: target.writer for name, target in TARGETS.items() if target.writer is not None}
BY_HAND: dict[str, Callable[[Plain], dict[str, Tensor]]] = {
    "gptq": lambda w: foreign.gptq(w, 1),
    "gptq_v2": lambda w: foreign.gptq(w, 0),
    "awq": foreign.awq_gemm,
    "compressed-tensors": foreign.compressed_tensors,
    "auto-round": lambda w: without(foreign.gptq(w, 1), "g_idx"),
}


@pytest.mark.parametrize("to", WRITERS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_writes_what_an_independent_writer_writes_or_refuses(to: str, data: st.DataObject) -> None:
    """Where section 9.2 of the specification says lossless: the same bytes, and read back the same weight."""
    writer: Writer = load(WRITERS[to])()
    bits = data.draw(st.sampled_from([2, 3, 4, 8]))
    plain = random_plain(
        64,
        128,
        bits=bits,
        group_size=data.draw(st.sampled_from([32, 64, -1])),
        sym=data.draw(st.booleans()),
        act_order=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 1000)),
        least_zero=data.draw(st.integers(0, 1)),
    )
    weight = ours(plain)
    possible = {
        "gptq": bool(plain.zeros.all()),
        "gptq_v2": True,
        "awq": bits == 4 and plain.trivial,
        "compressed-tensors": bits in (4, 8),
        "auto-round": plain.trivial and bool(plain.zeros.all()),
    }[to]
    assert (writer.why_not(weight) is None) == possible
    if not possible:
        return
    written = writer.tensors(weight)
    expected = BY_HAND[to](plain)
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(written[name], tensor), name
    config = writer.config(Summary({"a.q": weight.spec}))
    assert_is(read(config, written, (64, 128)), plain)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gptq", {"in_features": 80, "group_size": 16}, "in_features 80 is no multiple of 32"),
    ("gptq", {"out_features": 40}, "out_features 40 is no multiple of 32"),
    ("gptq", {"bits": 5}, "5 bits"),
    ("gptq", {"sym": False}, "zero point is 0.*convert to gptq_v2"),
    ("awq", {"bits": 8}, "8 bits: AWQ has 4"),
    ("awq", {"act_order": True}, "activation order"),
    ("compressed-tensors", {"bits": 3}, "3 bits: other widths"),
]


@pytest.mark.parametrize(("to", "fields", "reason"), REFUSED)
def test_refusals_name_the_condition(to: str, fields: dict[str, Any], reason: str) -> None:
    sizes = (fields.pop("out_features", 64), fields.pop("in_features", 64))
    writer: Writer = load(WRITERS[to])()
    told = writer.why_not(ours(random_plain(*sizes, **fields)))
    assert told is not None
    with pytest.raises(ValueError, match=reason):
        raise ValueError(told)


def test_scales_that_float16_would_change_are_refused_by_awq() -> None:
    weight = ours(random_plain(32, 64))
    wide = QuantizedWeight(weight.spec, weight.codes, torch.rand(32, 2), weight.zeros)
    told = load(str(WRITERS["awq"]))().why_not(wide)
    assert told is not None and "float16, all that AWQ has, changes them" in told


# --- tensors that do not fit -------------------------------------------------------------------------------------


def _without(key: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(key)


def _with(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({key: change(tensors[key])})


BAD: list[tuple[str, Callable[[dict[str, Tensor]], Any], str]] = [
    ("awq gemm", _without("qzeros"), "tensor 'qzeros' is missing"),
    ("awq gemm", _with("qweight", lambda t: t[:, :-1]), r"qweight is torch\.int32 \[64, 3\], expected .*\[64, 4\]"),
    ("awq gemm", _with("qweight", lambda t: t.float()), r"qweight is torch\.float32"),
    ("awq gemm", _with("scales", lambda t: t.int()), r"scales is torch\.int32"),
    ("awq gemm", _with("scales", lambda t: t * float("nan")), "scales hold NaN"),
    ("awq gemv", _with("qzeros", lambda t: t[:, :1]), r"qzeros is torch\.int32 \[32, 1\]"),
    ("awq gemv_fast", _with("qzeros", lambda t: t + 0.01), "gives no whole zero points"),
    ("awq gemv_fast", _with("qzeros", lambda t: t * 100), "gives no whole zero points"),
    ("compressed-tensors", _without("weight_scale"), "tensor 'weight_scale' is missing"),
    ("compressed-tensors", _with("weight_shape", lambda t: t + 1), r"weight_shape is \[33, 65\], the model has"),
    ("compressed-tensors", _with("weight_packed", lambda t: t[:, :-1]), r"weight_packed is \[32, 7\]: 7 words for 64 codes"),
    ("compressed-tensors", _with("weight_packed", lambda t: t[:-1]), r"weight_packed is \[31, 8\], expected 2 dimensions, 32"),
    ("compressed-tensors", _with("weight_packed", lambda t: t.flatten()), r"weight_packed is \[256\]"),
    ("compressed-tensors", _with("weight_zero_point", lambda t: t[:-1]), "weight_zero_point is"),
    ("gptq", _with("g_idx", lambda t: t + 9), "g_idx names groups 9 to 10 of 2"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "damage", "message"), BAD)
def test_tensors_that_do_not_fit(form: str, damage: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    _, _, config, tensors = FORMS[form]
    plain = random_plain(32, 64, sym=False, seed=3)
    made = tensors(plain)
    damage(made)
    with pytest.raises(CheckpointError, match=rf"layer 'a\.q': .*{message}"):
        read(config(plain), made, (32, 64))


def test_words_are_of_the_sizes_the_writers_use() -> None:
    assert WORD_BITS[torch.int32] == 32 and foreign.bit_string([1, 2], 4) == [0x21]
