"""What benchmarks/bench_linear_cpu.py times: our CPU backend and its peers, each behind the same small interface.

A peer turns a `QuantizedWeight` into a layer; a layer is given activations (float32 [M, K], once, untimed: the peer keeps
them in the form it likes best) and answers with a call that does one product and returns [M, N]. Peers whose grid is not
that of the weight (NF4, llama.cpp's q4_K) also return the float weight that theirs stands for, so that every product is
checked against the weight that it should have multiplied with.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import woq
from benchmarks.common import Absent, Call, Layer, Maker
from benchmarks.cpu_ggml import ggml_linear, ggml_version
from woq.backends import load, why_not
from woq.backends.base import ComputeDtype, Target
from woq.export.matmul_nbits import DOMAIN, to_nbits
from woq.weights import QuantizedWeight, WeightSpec

CPU = torch.device("cpu")
BF16, F32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Peer:
    """name: as in the CSV. package: which one it comes from. activations: "int8" where they are quantized on the way.
    bits: what a weight takes in memory, where it is not the weight's own. told: its version, where no package knows."""

    name: str
    package: str
    activations: Literal["exact", "int8"]
    make: Maker
    bits: float | None = None
    told: Callable[[], str] | None = None

    @property
    def version(self) -> str:
        """Of the package, for example "1.32.0"."""
        return self.told() if self.told else importlib.metadata.version(self.package)


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Absent(f"{module} is not installed ({error})") from error


def _simple(dtype: torch.dtype, product: Callable[[Tensor], Tensor]) -> Layer:
    """A layer of a function that takes its activations in `dtype`."""

    def bind(x: Tensor) -> Call:
        own = x.to(dtype)
        return lambda: product(own)

    return bind


# --- ours, and torch's ---------------------------------------------------------------------------------------------


def ours(backend_name: str, dtype: torch.dtype, compute_dtype: ComputeDtype | None = None) -> Maker:
    """One of the package's backends for CPUs."""

    def make(weight: QuantizedWeight) -> tuple[Layer, None]:
        target = Target(CPU, dtype, compute_dtype)
        reason = why_not(backend_name, weight.spec, target)
        if reason is not None:
            raise Absent(reason)
        backend = load(backend_name)
        state = backend.prepare(weight.pack(), target)
        return _simple(dtype, lambda x: backend.apply(x, state)), None

    return make


def dense(dtype: torch.dtype) -> Maker:
    """The float weight: what quantization has to beat."""

    def make(weight: QuantizedWeight) -> tuple[Layer, None]:
        w = weight.dequantize(dtype)
        return _simple(dtype, lambda x: F.linear(x, w)), None

    return make


def int4pack(weight: QuantizedWeight) -> tuple[Layer, None]:
    """torch's own int4 operator, which torchao's CPU layout calls as well."""
    if weight.spec.bits != 4:
        raise Absent("4 bits only")
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.to(torch.int32), 1)
    scales = weight.scales.float()
    both = (
        torch.stack([scales, (8 - weight.zeros.float()) * scales], -1).transpose(0, 1).to(BF16).contiguous()
    )
    group = weight.spec.group_size
    op = torch.ops.aten._weight_int4pack_mm_for_cpu
    return _simple(BF16, lambda x: op(x, packed, group, both)), None


def bitsandbytes_nf4() -> Maker:
    """bitsandbytes' own module, in blocks of 64; it repacks the weight at its first call where it has a kernel for that."""
    own_grid: dict[
        WeightSpec, tuple[Any, Tensor]
    ] = {}  # quantizing takes seconds: all copies hold one weight

    def make(weight: QuantizedWeight) -> tuple[Layer, Tensor]:
        bnb = _need("bitsandbytes")
        if weight.spec.bits != 4:
            raise Absent("NF4 has 4 bits")
        if weight.spec not in own_grid:
            n, k = weight.codes.shape
            module = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=BF16, quant_type="nf4").eval()
            values = weight.dequantize(BF16)
            module.weight = bnb.nn.Params4bit(values, requires_grad=False, quant_type="nf4").to("cpu")
            reference = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            own_grid[weight.spec] = module, reference.float()
        kept, reference = own_grid[weight.spec]
        layer = copy.deepcopy(kept)
        return _simple(BF16, lambda x: layer(x)), reference

    return make


# --- ONNX Runtime --------------------------------------------------------------------------------------------------


def onnxruntime(accuracy: int) -> Maker:
    """MatMulNBits in float32. accuracy_level 4 quantizes activations to int8; 0 leaves them as they are."""

    def make(weight: QuantizedWeight) -> tuple[Layer, None]:
        ort, _ = _need("onnxruntime"), _need("onnx")
        options = ort.SessionOptions()
        options.use_per_session_threads = False  # spinning pools of many sessions would fight one another
        session = ort.InferenceSession(_nbits_model(weight, accuracy), options, ["CPUExecutionProvider"])
        return lambda x: _bound_session(session, x, weight.spec.out_features), None

    return make


def start_onnxruntime(threads: int) -> None:
    """The one pool of all sessions; before the first of them."""
    _need("onnxruntime").set_global_thread_pool_sizes(threads, 1)


def _nbits_model(weight: QuantizedWeight, accuracy: int) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    made, spec = to_nbits(weight), weight.spec
    tensors = {"codes": made.codes, "scales": made.scales.float().flatten()}
    if made.zeros is not None:
        tensors["zeros"] = made.zeros.flatten()
    node = helper.make_node(
        "MatMulNBits", ["x", *tensors], ["y"], domain=DOMAIN, K=spec.in_features, N=spec.out_features,
        bits=made.bits, block_size=made.block, accuracy_level=accuracy,
    )  # fmt: skip
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["M", size])
        for name, size in (("x", spec.in_features), ("y", spec.out_features))
    ]
    held = [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in tensors.items()]
    graph = helper.make_graph([node], "linear", ends[:1], ends[1:], held)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    data: bytes = model.SerializeToString()
    return data


def _bound_session(session: Any, x: Tensor, out_features: int) -> Call:
    import numpy as np

    x, y = x.contiguous(), torch.empty(x.shape[0], out_features)
    binding = session.io_binding()
    for bind, name, tensor in ((binding.bind_input, "x", x), (binding.bind_output, "y", y)):
        bind(name, "cpu", 0, np.float32, tuple(tensor.shape), tensor.data_ptr())

    def call(_keep: Tensor = x) -> Tensor:
        session.run_with_iobinding(binding)
        return y

    return call


# --- OpenVINO ------------------------------------------------------------------------------------------------------


def openvino(threads: int, dynamic_group: int) -> Maker:
    """Compressed u4/u8 weights. dynamic_group: the group size of its dynamic quantization of activations; 0 is none."""

    def make(weight: QuantizedWeight) -> tuple[Layer, None]:
        ov = _need("openvino")
        config = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # it would pin the thread that everything else here runs on
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": dynamic_group,
        }
        compiled = ov.Core().compile_model(_openvino_model(ov, weight), "CPU", config)
        return lambda x: _bound_request(
            ov, compiled.create_infer_request(), x, weight.spec.out_features
        ), None

    return make


def _openvino_model(ov: Any, weight: QuantizedWeight) -> Any:
    import numpy as np
    from openvino import opset13 as ops

    spec = weight.spec
    if spec.bits not in (4, 8) or spec.in_features % spec.group_size:
        raise Absent("u4 and u8 with whole groups")
    kind = ov.Type.u4 if spec.bits == 4 else ov.Type.u8
    grouped = (spec.out_features, spec.groups, spec.group_size)

    def constant(codes: Tensor, shape: tuple[int, ...]) -> Any:
        flat = codes.flatten()
        data = flat if spec.bits == 8 else flat[::2] | flat[1::2] << 4
        tensor = ov.Tensor(kind, ov.Shape(shape))  # one made of an array would not keep that alive
        tensor.data.reshape(-1)[:] = data.numpy()
        return ops.convert(ops.constant(tensor), np.float16)

    zeros = constant(weight.zeros, (*grouped[:2], 1))
    centred = ops.subtract(constant(weight.codes, grouped), zeros)
    scales = ops.constant(weight.scales.half().unsqueeze(-1).numpy())
    w = ops.reshape(ops.multiply(centred, scales), [spec.out_features, spec.in_features], False)
    x = ops.parameter([-1, spec.in_features], np.float32, name="x")
    return ov.Model([ops.matmul(x, ops.convert(w, np.float32), False, True)], [x])


def _bound_request(ov: Any, request: Any, x: Tensor, out_features: int) -> Call:
    held = x.contiguous().numpy()
    y = torch.empty(x.shape[0], out_features)
    request.set_input_tensor(ov.Tensor(held, shared_memory=True))
    request.set_output_tensor(ov.Tensor(y.numpy(), shared_memory=True))

    def call(_keep: Any = held) -> Tensor:
        request.infer()
        return y

    return call


# --- the list ------------------------------------------------------------------------------------------------------


def peers(threads: int, ggml: Path | None) -> list[Peer]:
    """All of them, whether or not they are installed. ggml: the folder of llama.cpp's libraries, or None to look for it."""

    def llama(kind: str) -> Peer:
        version = partial(ggml_version, threads, ggml, kind)
        return Peer(
            f"llama.cpp {kind.lower()}", "ggml", "int8", ggml_linear(threads, ggml, kind), 4.5, version
        )

    def own(name: str, activations: Literal["exact", "int8"], make: Maker) -> Peer:
        return Peer(f"woq {name}", "woq", activations, make, told=lambda: woq.__version__)

    return [
        own("bf16", "exact", ours("cpu", BF16)),
        own("fp32", "exact", ours("cpu", F32)),
        own("int8", "int8", ours("cpu", BF16, "int8")),
        Peer("dense bf16", "torch", "exact", dense(BF16), 16),
        Peer("dense fp32", "torch", "exact", dense(F32), 32),
        Peer("torch int4pack", "torch", "exact", int4pack),
        Peer("bitsandbytes nf4", "bitsandbytes", "exact", bitsandbytes_nf4()),
        Peer("onnxruntime", "onnxruntime", "exact", onnxruntime(0)),
        Peer("onnxruntime int8", "onnxruntime", "int8", onnxruntime(4)),
        Peer("openvino", "openvino", "exact", openvino(threads, 0)),
        Peer("openvino int8", "openvino", "int8", openvino(threads, 128)),
        llama("Q4_0"),
        llama("Q4_K"),
    ]
