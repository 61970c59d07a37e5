"""A quantized weight survives every layout, and a standard GPTQ folder is one to a reader that shares no code of ours.

The readers here are written from formats.md (sections 1.5, 4.1 and 9.1) as plain loops over numpy words.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from woq.codebooks import VALUES
from woq.errors import CheckpointError
from woq.scales import DoubleQuant, encode
from woq.weights import (
    CODEBOOKS,
    DATA_TYPES,
    GPTQ_V1,
    GPTQ_V2,
    DataType,
    Layout,
    PackedWeight,
    QuantizedWeight,
    WeightSpec,
)

WORDS = (torch.int8, torch.int16, torch.int32, torch.int64)
PLAIN = tuple(Layout("inc_plain", 0, word, dim) for word, dim in itertools.product(WORDS, (0, 1)))
LAYOUTS = (GPTQ_V1, GPTQ_V2, *PLAIN)
SHAPES = {"grouped": (20, 96, 32), "per channel": (7, 64, 64), "ragged": (9, 80, 32), "odd": (5, 37, 37)}


def layout_name(layout: Layout) -> str:
    if layout.packing == "gptq":
        return "gptq_v1" if layout.zero_offset else "gptq_v2"
    return f"plain-{str(layout.compression_dtype).removeprefix('torch.')}-dim{layout.compression_dim}"


def random_weight(
    shape: tuple[int, int, int], bits: int, sym: bool, layout: Layout = GPTQ_V2, desc_act: bool = False
) -> QuantizedWeight:
    """Random codes, scales and zero points: (N, K, group size)."""
    n, k, group_size = shape
    spec = WeightSpec(k, n, bits, group_size, sym, desc_act, layout=layout)
    generator = torch.Generator().manual_seed(bits + n)
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator).to(torch.uint8)
    zeros = torch.randint(0, 1 << bits, (n, spec.groups), generator=generator).to(torch.uint8)
    if sym:
        zeros.fill_(1 << (bits - 1))
    scales = torch.randn(n, spec.groups, generator=generator).to(spec.scale_dtype)
    order = torch.randperm(k, generator=generator)
    g_idx = (order // group_size).to(torch.int32) if desc_act else None
    return QuantizedWeight(spec, codes, scales, zeros, g_idx)


@pytest.mark.parametrize("desc_act", [False, True], ids=["in order", "desc_act"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
def test_pack_and_unpack_are_inverse(layout: Layout, shape: tuple[int, int, int], desc_act: bool) -> None:
    for bits, sym in itertools.product(range(2, 9), (True, False)):
        before = random_weight(shape, bits, sym, layout, desc_act)
        packed = before.pack()
        shapes = {name: (tuple(t.shape), t.dtype) for name, t in packed.tensors().items()}
        assert shapes == before.spec.packed_shapes(), (bits, sym)
        after = packed.unpack()
        assert torch.equal(after.codes, before.codes), (bits, sym)
        assert torch.equal(after.zeros, before.zeros), (bits, sym)
        assert torch.equal(after.scales, before.scales), (bits, sym)
        assert torch.equal(after.groups_of_inputs(), before.groups_of_inputs()), (bits, sym)
        assert torch.equal(after.dequantize(), before.dequantize()), (bits, sym)


def other_kind(
    shape: tuple[int, int, int], data_type: DataType, layout: Layout, how: DoubleQuant | None
) -> QuantizedWeight:
    """`random_weight` of 4 bits as another data type, its scales as codes where `how` says."""
    plain = random_weight(shape, 4, data_type != "int_float_zeros", layout)
    spec = replace(plain.spec, data_type=data_type, double_quant=how)
    zeros = plain.zeros * 0 if spec.is_codebook else plain.zeros
    if data_type == "int_float_zeros":
        zeros = (plain.zeros + torch.rand(plain.zeros.shape)).to(spec.scale_dtype)
    coded = None if how is None else encode(plain.scales, how)
    scales = plain.scales if coded is None or how is None else coded.decode(how, spec.scale_dtype)
    return QuantizedWeight(spec, plain.codes, scales, zeros, None, coded)


HOW = {"scales": None, "8-bit scales": DoubleQuant(), "6-bit sym scales": DoubleQuant(6, 8, True)}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("data_type", DATA_TYPES)
def test_every_data_type_survives_every_layout(
    data_type: DataType, layout: Layout, how: DoubleQuant | None
) -> None:
    for shape in SHAPES.values():
        before = other_kind(shape, data_type, layout, how)
        packed = before.pack()
        assert {
            n: (tuple(t.shape), t.dtype) for n, t in packed.tensors().items()
        } == before.spec.packed_shapes()
        assert ("qzeros" in packed.tensors(), "zeros" in packed.tensors()) == (
            data_type == "int",
            data_type == "int_float_zeros",
        )
        assert ("scales" in packed.tensors()) == (how is None)
        after = PackedWeight.from_tensors(before.spec, packed.tensors(), "up").to("cpu").unpack()
        for one, other in (
            (after.codes, before.codes),
            (after.zeros, before.zeros),
            (after.scales, before.scales),
        ):
            assert torch.equal(one, other) and one.dtype == other.dtype
        assert torch.equal(after.dequantize(), before.dequantize())
        for name, tensor in after.pack().tensors().items():  # what was read is written again, to the bit
            assert torch.equal(tensor, packed.tensors()[name])


@pytest.mark.parametrize("data_type", ["int_float_zeros", *CODEBOOKS])
def test_other_data_types_are_their_formulas(data_type: DataType) -> None:
    weight = other_kind((6, 40, 16), data_type, GPTQ_V2, DoubleQuant(5, 8))
    w = weight.dequantize()
    for n, k in itertools.product(range(6), range(40)):
        code, scale = int(weight.codes[n, k]), float(weight.scales[n, k // 16])
        value = VALUES[data_type][code] if data_type in VALUES else code - float(weight.zeros[n, k // 16])
        assert float(w[n, k]) == pytest.approx(scale * value, rel=1e-6)


def test_scales_as_codes_need_their_codes() -> None:
    weight = other_kind((6, 40, 16), "int", GPTQ_V2, DoubleQuant())
    with pytest.raises(ValueError, match="needs scale_codes"):
        replace(weight, scale_codes=None).pack()


def test_a_reader_of_the_specification_reads_version_2() -> None:
    """docs/format.md, sections 3.1, 3.4 and 3.5, on numpy words."""
    weight = other_kind((20, 96, 32), "nf4", GPTQ_V1, DoubleQuant(6, 8))
    packed = {name: tensor.numpy() for name, tensor in weight.pack().tensors().items()}
    words, codes = packed["qweight"].astype(np.uint32), packed["qscales"].astype(np.uint32)[:, None]
    scales = np.zeros(60)
    for i in range(60):
        step, offset = packed["scale_steps"][i // 8], packed["scale_offsets"][i // 8]
        scales[i] = np.float16(np.float32(field(codes, i, 6)[0]) * step + offset)
    values = np.array(VALUES["nf4"], dtype=np.float32)
    got = np.stack(
        [values[field(words, k, 4)] * scales.reshape(20, 3)[:, k // 32] for k in range(96)], axis=1
    )
    assert np.allclose(got, weight.dequantize().numpy(), rtol=1e-6)


@pytest.mark.parametrize("desc_act", [False, True])
def test_dequantize_is_its_formula(desc_act: bool) -> None:
    weight = random_weight((6, 40, 16), 5, False, desc_act=desc_act)
    g = weight.groups_of_inputs()
    for n, k in itertools.product(range(6), range(40)):
        step = int(weight.codes[n, k]) - int(weight.zeros[n, g[k]])
        assert float(weight.dequantize()[n, k]) == float(weight.scales[n, g[k]]) * step


def test_packing_changes_nothing_it_is_given() -> None:
    weight = random_weight((20, 96, 32), 4, True, GPTQ_V1)
    codes, zeros = weight.codes.clone(), weight.zeros.clone()
    weight.pack()
    assert torch.equal(weight.codes, codes)
    assert torch.equal(weight.zeros, zeros)


# --- readers of their own ----------------------------------------------------------------------------------------


def field(words: NDArray[np.uint64], index: int, bits: int) -> NDArray[np.int64]:
    """Field `index` of the bit strings that the uint32 `words` [W, C] form along dimension 0, low bits first."""
    value = np.zeros(words.shape[1], dtype=np.int64)
    for bit in range(bits):
        word, shift = divmod(index * bits + bit, 32)
        value |= ((words[word].astype(np.int64) >> shift) & 1) << bit
    return value


def read_gptq(packed: PackedWeight, bits: int, v1: bool) -> NDArray[np.float64]:
    """The weight [N, K] of a GPTQ checkpoint's tensors, by the specification alone."""
    qweight = packed.qweight.numpy().astype(np.uint32)
    qzeros = packed.qzeros.numpy().astype(np.uint32)
    scales = packed.scales.to(torch.float64).numpy()
    assert packed.g_idx is not None
    g_idx = packed.g_idx.numpy()
    features, columns = len(g_idx), scales.shape[1]
    weight = np.zeros((columns, features))
    zeros = np.zeros(scales.shape)
    for n in range(columns):
        zeros[:, n] = field(qzeros.T, n, bits)
    if v1:
        zeros = (zeros + 1) % (1 << bits)
    for k in range(features):
        group = g_idx[k]
        weight[:, k] = scales[group] * (field(qweight, k, bits) - zeros[group])
    return weight


def read_plain(packed: PackedWeight, bits: int, dim: int, group_size: int) -> NDArray[np.float64]:
    """The weight [N, K] of neural-compressor's plain layout, by the specification alone."""
    width = packed.qweight.element_size() * 8
    per_word = width // bits

    def element(words: NDArray[np.int64], n: int, k: int) -> int:
        row, column, e = (n, k // per_word, k % per_word) if dim == 1 else (n // per_word, k, n % per_word)
        return (int(words[row, column]) % (1 << width) >> (bits * e)) % (1 << bits)

    scales = packed.scales.to(torch.float64).numpy()
    codes, zeros = packed.qweight.numpy(), packed.qzeros.numpy()
    n_rows, features = packed.spec.out_features, packed.spec.in_features
    weight = np.zeros((n_rows, features))
    for n, k in itertools.product(range(n_rows), range(features)):
        group = k // group_size
        weight[n, k] = scales[n, group] * (element(codes, n, k) - element(zeros, n, group))
    return weight


@pytest.mark.parametrize("desc_act", [False, True], ids=["in order", "desc_act"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("sym", "layout"), [(True, GPTQ_V1), (False, GPTQ_V2)], ids=["sym-v1", "asym-v2"])
def test_gptq_layout_by_an_independent_reader(bits: int, sym: bool, layout: Layout, desc_act: bool) -> None:
    weight = random_weight((32, 64, 32), bits, sym, layout, desc_act)
    read = read_gptq(weight.pack(), bits, v1=layout is GPTQ_V1)
    assert np.array_equal(read, weight.dequantize(torch.float64).numpy())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("layout", PLAIN, ids=layout_name)
def test_plain_layout_by_an_independent_reader(bits: int, layout: Layout) -> None:
    weight = random_weight((9, 40, 16), bits, False, layout)
    read = read_plain(weight.pack(), bits, layout.compression_dim, 16)
    assert np.array_equal(read, weight.dequantize(torch.float64).numpy())


@pytest.mark.parametrize(("bits", "word"), [(2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)])
def test_symmetric_v1_zero_points_are_the_known_constant(bits: int, word: int) -> None:
    packed = random_weight((32, 64, 32), bits, True, GPTQ_V1).pack()
    assert (packed.qzeros == word).all()


def test_zero_point_zero_wraps_inside_its_own_field() -> None:
    """v1 stores z - 1: z = 0 must become 2^b - 1 without borrowing from the next field."""
    weight = random_weight((32, 32, 32), 4, False, GPTQ_V1)
    zeros = torch.tensor([8, 8, 0, 8, 0, 1, 15, 7], dtype=torch.uint8).repeat(4).unsqueeze(1)
    packed = replace(weight, zeros=zeros).pack()
    assert int(packed.qzeros[0, 0]) & 0xFFFFFFFF == 0x6E0F7F77
    assert torch.equal(packed.unpack().zeros, zeros)


# --- what does not fit -------------------------------------------------------------------------------------------


def test_from_tensors_names_what_is_wrong() -> None:
    packed = random_weight((20, 96, 32), 4, True, GPTQ_V1).pack()
    good = packed.tensors()
    bad = {
        "qzeros": good["qzeros"].to(torch.int64),
        "scales": good["scales"][:2],
        "qweight": good["qweight"][:, :10],
    }
    for name, tensor in bad.items():
        with pytest.raises(CheckpointError, match=rf"layer 'some\.layer': {name} is .*expected"):
            PackedWeight.from_tensors(packed.spec, {**good, name: tensor}, "some.layer")
    with pytest.raises(CheckpointError, match=r"layer 'some\.layer': tensor 'scales' is missing"):
        PackedWeight.from_tensors(packed.spec, {n: t for n, t in good.items() if n != "scales"}, "some.layer")
