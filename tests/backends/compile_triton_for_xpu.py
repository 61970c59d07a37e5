"""Compile the Triton kernel to SPIR-V for an Intel XPU, on a machine without one: `make compile-triton-xpu`.

Intel's Triton is another package than NVIDIA's and cannot stand beside it, so this is a program and no test. It needs no
driver: what Triton would ask of one, the device's properties, is given here. It shows that the kernel compiles, no more.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from woq.backends.triton import TUNED, Tiling, _linear_kernel

MAX_1100: dict[str, Any] = {
    "name": "Intel(R) Data Center GPU Max 1100",
    "gpu_eu_count": 448,
    "gpu_subslice_count": 56,
    "max_work_group_size": 1024,
    "max_num_sub_groups": 64,
    "sub_group_sizes": [16, 32],
    "has_fp64": True,
    "has_subgroup_matrix_multiply_accumulate": True,
    "has_subgroup_matrix_multiply_accumulate_tensor_float32": True,
    "has_subgroup_2d_block_io": True,
    "has_bfloat16_conversions": True,
}


def compile_one(bits: int, sym: bool, ordered: bool, dtype: str, tiling: Tiling) -> Any:
    """One variant; raises what the compiler raises."""
    t = tiling
    signature = {
        "x": f"*{dtype}",
        "words": "*i32",
        "scales": "*fp16",
        "zeros": "*i32" if sym else "*u8",
        "order": "*i32",
        "out": f"*{dtype}" if t.split_k == 1 else "*fp32",
        **dict.fromkeys(("m_size", "n_size", "k_size", "k_padded", "group_size"), "i32"),
    }
    constants = {
        "BITS": bits, "SYM": sym, "ORDERED": ordered, "ONE_GROUP": not ordered,
        "BLOCK_M": t.block_m, "BLOCK_N": t.block_n, "BLOCK_K": t.block_k, "SPLIT_K": t.split_k,
    }  # fmt: skip
    names = _linear_kernel.arg_names
    source = ASTSource(
        fn=_linear_kernel,
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    options = {"num_warps": t.num_warps, "num_stages": t.num_stages}
    return triton.compile(source, target=GPUTarget("xpu", MAX_1100, 32), options=options)


def main() -> None:
    """Every width, symmetric or not, in order or not, in one 16-bit dtype, in the tiling for decoding."""
    inner = backends["intel"].compiler.__init__.__globals__
    inner["compile_module_from_src"] = lambda *_, **__: SimpleNamespace(parse_device_arch=lambda _: "")
    done = 0
    choices = itertools.product(range(2, 9), (True, False), (False, True))
    for bits, sym, ordered in choices:
        compiled = compile_one(bits, sym, ordered, "fp16" if bits % 2 else "bf16", TUNED[""][0][1])
        assert compiled.asm["spv"]
        done += 1
    print(f"triton-xpu {triton.__version__}: {done} variants compiled to SPIR-V")  # noqa: T201


if __name__ == "__main__":
    main()
