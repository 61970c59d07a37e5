"""Compile the Triton kernels to SPIR-V for an Intel XPU, on a machine without one: `make compile-triton-xpu`.

Intel's Triton is another package than NVIDIA's and cannot stand beside it, so this is a program and no test. It needs no
driver: what Triton would ask of one, the device's properties, is given here. It shows that the kernels compile, no more.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from woq.backends import triton_kernels as kernels
from woq.backends.triton_layout import WIDTHS, block_of
from woq.backends.triton_plans import Plan, fitted, plan_for

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


SHARED_MEMORY = 131072  # bytes, of a Data Center GPU Max 1100
INTEGERS = ("m_size", "n_size", "k_size", "blocks", "groups", "fetch", "row_length", "group_size", "size")


def compile_kernel(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], plan: Plan) -> None:
    """One variant; raises what the compiler raises."""
    names = kernel.arg_names
    signature = {**pointers, **dict.fromkeys((name for name in INTEGERS if name in names), "i32")}
    constants = {name: value for name, value in constants.items() if name in names}
    source = ASTSource(
        fn=kernel,
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    options = {"num_warps": plan.warps, "num_stages": plan.stages}
    compiled = triton.compile(source, target=GPUTarget("xpu", MAX_1100, 32), options=options)
    assert compiled.asm["spv"]


def variants(bits: int, sym: bool, even: bool) -> Iterator[tuple[Any, dict[str, str], dict[str, Any], Plan]]:
    """The kernels as an unknown device's plans launch them, and the weight's way to a float matrix."""
    dtype = "fp16" if bits % 2 else "bf16"
    wa, wb, wc = (*WIDTHS[bits], 0, 0)[:3]
    constants = {
        "WA": wa, "WB": wb, "WC": wc, "BLOCK": block_of(bits), "SYM": sym, "PACKED": False, "EARLY": False,
        "EVEN": even, "GROUP": 128 if even else 32, "BY_RUN": even,
    }  # fmt: skip
    weight = {"words": "*i16", "scales": "*fp16", "zeros": "*fp16" if sym else "*u8"}
    for tokens in (1, 16, 64):
        plan = fitted(plan_for(MAX_1100["name"], bits, tokens, 4096, 4096), bits, SHARED_MEMORY)
        if plan.kernel != "dense":
            tiles = {
                "BLOCK_M": plan.block_m,
                "BLOCK_N": plan.block_n,
                "PARTS": plan.parts,
                "STAGES": plan.stages,
            }
            decode = plan.kernel == "decode"
            out = f"*{dtype}" if decode or plan.parts == 1 else "*fp32"
            kernel = kernels._decode_kernel if decode else kernels._prefill_kernel
            yield kernel, {"x": f"*{dtype}", **weight, "out": out}, {**constants, **tiles}, plan
    plan = Plan("dense", 0, 64, 1, 4, 1, False)
    yield kernels._dequantize_kernel, {**weight, "out": f"*{dtype}"}, {**constants, "BLOCK_N": 64}, plan


def main() -> None:
    """Every width, symmetric or not, with masks or without, each in one 16-bit dtype."""
    inner = backends["intel"].compiler.__init__.__globals__
    inner["compile_module_from_src"] = lambda *_, **__: SimpleNamespace(parse_device_arch=lambda _: "")
    done = 0
    for bits, (sym, even) in itertools.product(range(2, 9), ((True, True), (False, True), (False, False))):
        for variant in variants(bits, sym, even):
            compile_kernel(*variant)
            done += 1
    plan = Plan("dense", 0, 0, 4, 4, 1, False)
    one = {"BLOCK": 1024, "EARLY": False, "PARTS": 4}
    compile_kernel(kernels._sum_kernel, {"parts": "*fp32", "out": "*bf16"}, one, plan)
    compile_kernel(kernels._gather_kernel, {"x": "*bf16", "order": "*i32", "out": "*bf16"}, one, plan)
    print(f"triton-xpu {triton.__version__}: {done + 2} variants compiled to SPIR-V")  # noqa: T201


if __name__ == "__main__":
    main()
