"""A weight as MatMulNBits stores it: to the bit what it was, and what ONNX Runtime's operator makes of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from woq.errors import CheckpointError
from woq.export.matmul_nbits import NBitsLinear, dequantize, pack_bytes, to_nbits, unpack_bytes, why_not
from woq.weights import QuantizedWeight, WeightSpec


def random_weight(
    bits: int, group_size: int, sym: bool, ordered: bool, n: int = 24, k: int = 96, seed: int = 0
) -> QuantizedWeight:
    draw = torch.Generator().manual_seed(seed)
    size = min(group_size, k)
    groups = -(-k // size)
    g_idx = torch.arange(k) // size
    spec = WeightSpec(k, n, bits, size, sym, desc_act=ordered)
    zeros = torch.randint(1 << bits, (n, groups), generator=draw, dtype=torch.uint8)
    return QuantizedWeight(
        spec,
        torch.randint(1 << bits, (n, k), generator=draw, dtype=torch.uint8),
        torch.randn(n, groups, generator=draw).half(),
        torch.full_like(zeros, 1 << bits - 1) if sym else zeros,
        g_idx[torch.randperm(k, generator=draw)].to(torch.int32) if ordered else None,
    )


@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(2, 8), group_size=st.sampled_from([16, 32, 48, 96, 1000]), sym=st.booleans(),
    ordered=st.booleans(), n=st.integers(1, 9), seed=st.integers(0, 99),
)  # fmt: skip
def test_nothing_is_lost(bits: int, group_size: int, sym: bool, ordered: bool, n: int, seed: int) -> None:
    weight = random_weight(bits, group_size, sym, ordered and group_size < 96, n=n, seed=seed)
    assert why_not(weight) is None
    stored = to_nbits(weight)
    assert stored.bits in (2, 4, 8) and stored.block in (16, 32, 64, 128, 256)
    assert (stored.zeros is None) == sym
    expected = weight.dequantize()
    got = dequantize(stored, weight.spec.in_features)
    assert torch.equal(got, expected if stored.order is None else expected[:, stored.order])


@given(bits=st.sampled_from([2, 4, 8]), count=st.integers(1, 40), seed=st.integers(0, 9))
def test_bytes_are_an_inverse_pair(bits: int, count: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(1 << bits, (3, count), generator=draw, dtype=torch.uint8)
    packed = pack_bytes(codes, bits)
    assert packed.shape == (3, -(-count * bits // 8))
    assert torch.equal(unpack_bytes(packed, bits, count), codes)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("group_size", "ordered"), [(32, False), (32, True), (96, False), (1000, False)])
@pytest.mark.parametrize("sym", [True, False])
def test_onnxruntime_computes_it(bits: int, group_size: int, ordered: bool, sym: bool) -> None:
    """One node, built here by hand from the tensors, against the dequantized weight."""
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    weight = random_weight(bits, group_size, sym, ordered)
    stored, spec = to_nbits(weight), weight.spec
    tensors = {"B": stored.codes.numpy(), "scales": stored.scales.flatten().float().numpy()}
    if stored.zeros is not None:
        tensors["zeros"] = stored.zeros.flatten().numpy()
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", *tensors], ["y"], domain="com.microsoft",
        K=spec.in_features, N=spec.out_features, bits=stored.bits, block_size=stored.block,
    )  # fmt: skip
    floats = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node], "one",
        [onnx.helper.make_tensor_value_info("x", floats, [None, spec.in_features])],
        [onnx.helper.make_tensor_value_info("y", floats, [None, spec.out_features])],
        [onnx.numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.randn(5, spec.in_features, generator=torch.Generator().manual_seed(1))
    given = x if stored.order is None else x[:, stored.order]
    (got,) = session.run(None, {"x": given.contiguous().numpy()})
    expected = (x @ weight.dequantize().T).numpy()
    assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()


def test_refused_by_name() -> None:
    with pytest.raises(
        CheckpointError, match=r"layer 'a\.b' cannot be exported: group size 8: .*multiples of 16"
    ):
        NBitsLinear(random_weight(4, 8, True, False), None, "a.b")
