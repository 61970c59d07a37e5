"""llama.cpp's matrix product on the CPU, through its C interface: one `ggml_mul_mat` a layer.

Weights lie in the buffer that llama.cpp itself would choose: the first of its extra kinds (AMX, repacked) that takes the
product, else plain memory. The libraries are those of a build of llama.cpp with shared libraries (`--ggml FOLDER`), or of the
package llama-cpp-python. Activations are quantized to 8 bits by every kernel behind quantized weights.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Absent, Call, Layer, Maker
from woq.interop.gguf_blocks import to_blocks
from woq.interop.gguf_blocks import why_not as no_blocks
from woq.weights import QuantizedWeight, WeightSpec

KINDS = {"F32": 0, "Q4_0": 2, "Q4_K": 12}  # enum ggml_type, which is also what files hold
_DEVICE_CPU = 0


class _Parameters(ctypes.Structure):
    """struct ggml_init_params"""

    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class _Feature(ctypes.Structure):
    """struct ggml_backend_feature"""

    _fields_ = [("name", c_char_p), ("value", c_char_p)]


_BASE: dict[str, tuple[Any, list[Any]]] = {
    "ggml_log_set": (None, [c_void_p, c_void_p]),
    "ggml_init": (c_void_p, [_Parameters]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_version": (c_char_p, []),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_dev_backend_reg": (c_void_p, [c_void_p]),
    "ggml_backend_dev_buffer_type": (c_void_p, [c_void_p]),
    "ggml_backend_dev_init": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_char_p, c_size_t, c_size_t]),
}
_TOP: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_load_all_from_path": (None, [c_char_p]),
    "ggml_backend_dev_by_type": (c_void_p, [c_int]),
}


def libraries(folder: Path | None) -> Path | None:
    """The folder that holds libggml.so: the one given, or that of an installed package."""
    if folder is not None:
        return folder
    spec = importlib.util.find_spec("llama_cpp")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if any(Path(place, "lib").glob("libggml.so*")):
            return Path(place, "lib")
    return None


class Ggml:
    """ggml with its CPU device ready, on `threads` threads."""

    def __init__(self, folder: Path, threads: int) -> None:
        names = ("libggml-base.so*", "libggml.so*")
        base, top = (ctypes.CDLL(str(min(folder.glob(name))), ctypes.RTLD_GLOBAL) for name in names)
        for library, functions in ((base, _BASE), (top, _TOP)):
            for name, (result, arguments) in functions.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
        self.base = base
        self.silence = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda *_: None)
        base.ggml_log_set(self.silence, None)  # it would tell of every tensor
        top.ggml_backend_load_all_from_path(str(folder).encode())
        self.device = top.ggml_backend_dev_by_type(_DEVICE_CPU)
        self.backend = base.ggml_backend_dev_init(self.device, None)
        self.registry = base.ggml_backend_dev_backend_reg(self.device)
        self.address = address = functools.partial(base.ggml_backend_reg_get_proc_address, self.registry)
        ctypes.CFUNCTYPE(None, c_void_p, c_int)(address(b"ggml_backend_set_n_threads"))(self.backend, threads)
        listed = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(
            address(b"ggml_backend_dev_get_extra_bufts")
        )(self.device)
        self.buffer_types: list[int] = []
        while (kind := listed[len(self.buffer_types)]) is not None:
            self.buffer_types.append(kind)
        self.buffer_types.append(base.ggml_backend_dev_buffer_type(self.device))
        self.chosen: dict[str, str] = {}

    def features(self) -> list[str]:
        """What the CPU device was compiled for, as llama.cpp calls it: AVX2, AVX512_VNNI, AMX_INT8 and so on."""
        listed = ctypes.CFUNCTYPE(ctypes.POINTER(_Feature), c_void_p)(
            self.address(b"ggml_backend_get_features")
        )(self.registry)
        found: list[str] = []
        while (name := listed[len(found)].name) is not None:
            found.append(name.decode())
        return found

    def context(self) -> int:
        """A context for a few tensors and a graph, none with memory of its own."""
        found: int = self.base.ggml_init(_Parameters(1 << 20, None, True))
        return found

    def weight(self, kind: str, data: bytes, rows: int, columns: int) -> int:
        """A weight tensor in the best buffer that can multiply it."""
        base = self.base
        for buffer_type in self.buffer_types:
            held, scratch = self.context(), self.context()
            tensor = base.ggml_new_tensor_2d(held, KINDS[kind], columns, rows)
            buffer = base.ggml_backend_alloc_ctx_tensors_from_buft(held, buffer_type)
            x = base.ggml_new_tensor_2d(scratch, KINDS["F32"], columns, 512)
            fits = buffer and base.ggml_backend_dev_supports_op(
                self.device, base.ggml_mul_mat(scratch, tensor, x)
            )
            base.ggml_free(scratch)
            if fits:
                base.ggml_backend_tensor_set(tensor, data, 0, len(data))
                self.chosen[kind] = base.ggml_backend_buft_name(buffer_type).decode()
                found: int = tensor
                return found
            if buffer:
                base.ggml_backend_buffer_free(buffer)
            base.ggml_free(held)
        raise RuntimeError(f"no buffer of ggml's CPU device multiplies {kind}")

    def bind(self, weight: int, rows: int, x: Tensor) -> Call:
        """x float32 [M, K]: a call that computes [M, rows] into memory of ggml's."""
        base, context = self.base, self.context()
        m, k = x.shape
        inputs = base.ggml_new_tensor_2d(context, KINDS["F32"], k, m)
        product = base.ggml_mul_mat(context, weight, inputs)
        graph = base.ggml_new_graph(context)
        base.ggml_build_forward_expand(graph, product)
        buffer = base.ggml_backend_alloc_ctx_tensors_from_buft(context, self.buffer_types[-1])
        data = x.contiguous().numpy().tobytes()
        base.ggml_backend_tensor_set(inputs, data, 0, len(data))
        memory = (ctypes.c_float * (m * rows)).from_address(base.ggml_get_data(product))
        y = torch.frombuffer(memory, dtype=torch.float32).view(m, rows)
        owner = _Owner(lambda: (base.ggml_backend_buffer_free(buffer), base.ggml_free(context)))

        def call(_keep: _Owner = owner) -> Tensor:
            status = base.ggml_backend_graph_compute(self.backend, graph)
            if status:
                raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
            return y

        return call

    def quantize(self, kind: str, weight: Tensor) -> bytes:
        """float32 [N, K] -> rows of blocks."""
        n, k = weight.shape
        out = ctypes.create_string_buffer(n * k)
        size = self.base.ggml_quantize_chunk(KINDS[kind], weight.contiguous().data_ptr(), out, 0, n, k, None)
        return out.raw[:size]


class _Owner:
    """Gives memory back when the call that uses it is gone."""

    def __init__(self, free: Callable[[], object]) -> None:
        self.free = free

    def __del__(self) -> None:
        self.free()


@functools.cache
def opened(folder: Path, threads: int) -> Ggml:
    return Ggml(folder, threads)


def ggml_version(threads: int, folder: Path | None, kind: str) -> str:
    """The libraries' version, where weights of this kind were put, and what the kernels were compiled for."""
    place = libraries(folder)
    assert place is not None  # asked of a peer that has been built
    ggml = opened(place, threads)
    compiled = " ".join(name for name in ggml.features() if name.startswith(("AVX", "AMX")))
    return f"{ggml.base.ggml_version().decode()} {ggml.chosen[kind]} {compiled}"


def _quantized(ggml: Ggml, kind: str, weight: QuantizedWeight) -> tuple[bytes, Tensor]:
    """A weight in llama.cpp's own grid, and what that stands for."""
    import gguf
    import numpy as np

    data = ggml.quantize(kind, weight.dequantize())
    rows = np.frombuffer(data, np.uint8).reshape(weight.spec.out_features, -1)
    return data, torch.from_numpy(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind]))


def ggml_linear(threads: int, folder: Path | None, kind: str) -> Maker:
    """kind: "Q4_0", which holds a symmetric weight of ours to the bit, or "Q4_K", llama.cpp's own grid."""
    own_grid: dict[
        WeightSpec, tuple[bytes, Tensor]
    ] = {}  # quantizing takes seconds: all copies hold one weight

    def make(weight: QuantizedWeight) -> tuple[Layer, Tensor | None]:
        place = libraries(folder)
        if place is None:
            raise Absent("no shared libraries of llama.cpp: pass --ggml, or install llama-cpp-python")
        reason = no_blocks(weight) or (
            None if weight.spec.sym and weight.spec.bits == 4 else "4 bits, symmetric"
        )
        if reason is not None:
            raise Absent(reason)
        ggml, n = opened(place, threads), weight.spec.out_features
        if kind == "Q4_0":
            data, reference = to_blocks(weight).numpy().tobytes(), None
        else:
            if weight.spec not in own_grid:
                own_grid[weight.spec] = _quantized(ggml, kind, weight)
            data, reference = own_grid[weight.spec]
        held = ggml.weight(kind, data, n, weight.spec.in_features)
        return (lambda x: ggml.bind(held, n, x)), reference

    return make
