"""The package's own CPU kernels (csrc/cpu): any width, any group size, every data type, any number of tokens.

`prepare` moves codes and scales once into the order in which the kernels read them (csrc/cpu/kernels.h). `apply` is one
operator, `woq::cpu_linear`, compiled for several instruction sets of which it picks the processor's best; it is
registered with a fake implementation, so it works under torch.compile. With `compute_dtype="int8"` activations are
rounded to int8, token by token and group by group, which is faster and less exact. docs/cpu.md says how far, and how the
kernels work.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, library

from woq import codebooks, native
from woq.backends.base import Backend, Target
from woq.weights import DATA_TYPES, DataType, PackedWeight, WeightSpec

BLOCK = 16  # rows that stand together; padded to an even number of blocks
UNIT = 32  # inputs that stand together; every group is padded to whole units
MAX_UNITS = 4  # of the kernels' groups: larger ones are split, with the same scale in every part
LEVELS = ("portable", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16")
"""The instruction sets that the kernels are compiled for, by the number that the operator takes as `level`."""
BEST = -1
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class CpuState:
    """A weight in the kernels' order.

    weight: int32 [blocks, groups, units, 16 * bits]; scales: [blocks, groups, 16] in the checkpoint's dtype
    zeros: uint8 or float32 like scales, or None: `zero` everywhere
    table: float32 [16], the values of a codebook, or None
    order: int32 [groups * units * 32], which column of x comes where, -1 for padding; None: as they are
    """

    weight: Tensor
    scales: Tensor
    zeros: Tensor | None
    table: Tensor | None
    order: Tensor | None
    out_features: int
    bits: int
    zero: float
    int8: bool


class CpuBackend(Backend[CpuState]):
    """See the module's head."""

    name = "cpu"
    data_types: ClassVar[tuple[DataType, ...]] = DATA_TYPES

    def why_not(self, spec: WeightSpec, target: Target) -> str | None:
        if target.dtype not in _DTYPES:
            return f"computes in bfloat16, float16 and float32, not in {target.dtype}"
        return native.why_not("cpu")

    def prepare(self, packed: PackedWeight, target: Target) -> CpuState:
        _register()
        packed = packed.to("cpu")
        return arrange(packed, int8=target.compute_dtype == "int8")

    def apply(self, x: Tensor, state: CpuState) -> Tensor:
        return multiply(x, state)


def multiply(x: Tensor, state: CpuState, level: int = BEST, matmul_from: int = -1) -> Tensor:
    """x [..., in_features] -> [..., out_features], by the kernels of `LEVELS[level]`, or the best ones.

    matmul_from: from so many bfloat16 tokens on the weight is dequantized panel by panel and multiplied by torch; -1: where
    the processor has AMX, and then from where that is faster.

    Raises RuntimeError where the processor does not have them.
    """
    y: Tensor = torch.ops.woq.cpu_linear(
        x.contiguous(),
        state.weight,
        state.scales,
        state.zeros,
        state.table,
        state.order,
        state.out_features,
        state.bits,
        state.zero,
        state.int8,
        level,
        matmul_from,
    )
    return y


def levels() -> list[str]:
    """Those of `LEVELS` that this processor has. The library must be there (`native.why_not`)."""
    return [name for number, name in enumerate(LEVELS) if torch.ops.woq.cpu_has_level(number)]


def arrange(packed: PackedWeight, *, int8: bool = False) -> CpuState:
    """The kernels' form of `packed`, which is on the CPU."""
    spec = packed.spec
    order, units = _order(spec, packed.g_idx if spec.desc_act else None)
    part = next(d for d in range(MAX_UNITS, 0, -1) if units % d == 0)
    parts = units // part
    stored_bits = spec.bits if spec.bits <= 4 else 8
    codes = packed.qweight.contiguous() if spec.layout.packing == "gptq" else packed.unpack().codes
    weight = torch.ops.woq.cpu_pack(
        codes,
        order,
        spec.out_features,
        spec.in_features,
        spec.bits,
        stored_bits,
        spec.groups * parts,
        part,
    )
    zeros = None
    if not spec.sym and not spec.is_codebook:
        zeros = packed.decoded_zeros()
        zeros = _by_block(zeros if zeros.dtype == torch.uint8 else zeros.float(), parts)
    return CpuState(
        weight=weight,
        scales=_by_block(packed.decoded_scales(), parts),
        zeros=zeros,
        table=codebooks.table(spec.data_type, codes) if spec.is_codebook else None,
        order=order,
        out_features=spec.out_features,
        bits=stored_bits,
        zero=0.0 if spec.is_codebook else float(1 << (spec.bits - 1)),
        int8=int8,
    )


def _order(spec: WeightSpec, g_idx: Tensor | None) -> tuple[Tensor | None, int]:
    """Which column comes where (None: as they are) so that every group fills whole units, and the units of a group."""
    if g_idx is None:
        units = -(-spec.group_size // UNIT)
        if spec.groups == 1 or spec.group_size % UNIT == 0:
            return None, units
        groups = torch.arange(spec.in_features) // spec.group_size
    else:
        groups = g_idx.to(torch.int64)
    members = torch.bincount(groups, minlength=spec.groups)  # not all alike in checkpoints of others
    units = max(1, -(-int(members.max()) // UNIT))
    columns = torch.argsort(groups, stable=True)
    of = groups[columns]
    place = torch.arange(spec.in_features) - (members.cumsum(0) - members)[of]
    order = torch.full((spec.groups, units * UNIT), -1, dtype=torch.int32)
    order[of, place] = columns.to(torch.int32)
    return order.flatten(), units


def _by_block(values: Tensor, parts: int) -> Tensor:
    """[N, G] -> [blocks, G * parts, 16]: a block's rows are neighbours, and every part of a group has its own."""
    n, groups = values.shape
    blocks = -(-n // (2 * BLOCK)) * 2
    padded = F.pad(values, (0, 0, 0, blocks * BLOCK - n))
    by_block = padded.view(blocks, BLOCK, groups).transpose(1, 2)
    return by_block.repeat_interleave(parts, dim=1).contiguous()


@functools.cache
def _register() -> None:
    """What the compiled operator does not bring itself: its shape, for tracing."""

    def linear_shape(x: Tensor, *rest: Any) -> Tensor:
        return x.new_empty(*x.shape[:-1], rest[5])

    library.register_fake("woq::cpu_linear", linear_shape)
