"""AWQ folders: AutoAWQ's gemm, gemv and gemv_fast layouts, and llm-awq's, which is gemv_fast under other names.

All are 4 bits with unshifted zero points and differ in where a nibble stands (`formats.md` section 5). gemv_fast keeps
-scale * zero as a float: the integer zero point is recovered where the quotient is one within float16's rounding, else
the folder is refused. Written is gemm, the one that every server reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from woq import packing
from woq.errors import CheckpointError
from woq.interop.base import HALVES, Found, Layer, Parts, Reader, Summary, Writer, first_refusal, pack
from woq.interop.gptq import usual_settings, whole_and_even
from woq.weights import PackedWeight, QuantizedWeight

BITS, PER_WORD = 4, 8
GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds column GEMM_ORDER[i] of eight
GEMM, GEMV, GEMV_FAST, LLM_AWQ = "gemm", "gemv", "gemv_fast", "llm-awq"


# --- the layouts, as pure functions ------------------------------------------------------------------------------


def pack_gemm(codes: Tensor) -> Tensor:
    """uint8 [R, N] -> int32 [R, N/8], eight columns a word in AWQ's order."""
    rows, columns = codes.shape
    ordered = codes.reshape(rows, columns // PER_WORD, PER_WORD)[:, :, list(GEMM_ORDER)]
    return packing.pack_floor(ordered.reshape(rows, columns), BITS, torch.int32)


def unpack_gemm(words: Tensor) -> Tensor:
    """Inverse of `pack_gemm`."""
    rows, count = words.shape
    nibbles = packing.unpack_floor(words, BITS, count * PER_WORD).reshape(rows, count, PER_WORD)
    codes = torch.empty_like(nibbles)
    codes[:, :, list(GEMM_ORDER)] = nibbles
    return codes.reshape(rows, count * PER_WORD)


def zeros_width(groups: int, group_size: int) -> int:
    """Words of a row of gemv's zero points: rounded up so that kernels may read ahead."""
    words = -(-groups // PER_WORD)
    step = 1 if group_size >= 128 else 2 if group_size == 64 else 4
    return -(-words // step) * step


def unpack_gemv_fast(words: Tensor) -> Tensor:
    """int16 [N/4, K] -> uint8 [N, K]. K is a multiple of 64.

    Four rows are interleaved in runs of 64 columns; within a run of 32, columns stand as a tensor core wants them.
    """
    quads, columns = words.shape
    nibbles = packing.unpack_floor(words, BITS, columns * 4).reshape(quads, columns // 64, 64, 4)
    # 64 words are one stream of 256 nibbles: 64 columns of the first row, of the second, third, fourth.
    rows = nibbles.reshape(quads, columns // 64, 4, 64).transpose(1, 2).reshape(quads * 4, columns)
    codes = torch.empty_like(rows)
    codes[:, _fast_order(columns)] = rows
    return codes


def _fast_order(columns: int) -> Tensor:
    """int64 [K]: the input feature at each position of a row."""
    run = torch.arange(32).reshape(4, 4, 2).transpose(0, 1).reshape(4, 8)
    run = run.reshape(4, 4, 2).transpose(1, 2).reshape(32)
    return (torch.arange(0, columns, 32).unsqueeze(1) + run).flatten()


def whole_zeros(scales: Tensor, scaled: Tensor) -> Tensor | None:
    """uint8 zero points from -scale * zero as stored in float16; None where a quotient is no code.

    scales, scaled: float [N, G].
    """
    quotient = torch.where(scales == 0, 0.0, -scaled.float() / scales.float())
    zeros = quotient.round()
    off = (quotient - zeros).abs() > 2.0**-10 * zeros.abs().clamp(min=1)
    if bool(off.any()) or zeros.min() < 0 or zeros.max() > 15:
        return None
    return zeros.to(torch.uint8)


# --- reading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sizes:
    """A layer's sizes by the letters of the specification: N, K, group size, G."""

    n: int
    k: int
    s: int
    g: int


class AwqReader(Reader):
    """AutoAWQ's and llm-awq's folders."""

    format: ClassVar[str] = "awq"
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scaled_zeros", "scales")

    def __init__(self, found: Found) -> None:
        super().__init__(found)
        self.group_size = found.integer("q_group_size", "group_size")
        bits = found.integer("w_bit", "bits")
        if bits != BITS:
            raise CheckpointError(f"{found.where}: AWQ folders have 4 bits, this one says {bits}")
        backend = str(found.raw.get("backend", "")).lower()
        stated = LLM_AWQ if backend == LLM_AWQ else str(found.raw.get("version") or GEMM).lower()
        self.version = stated.replace("gemv-fast", GEMV_FAST)
        if self.version not in (GEMM, GEMV, GEMV_FAST, LLM_AWQ):
            raise CheckpointError(
                f"{found.where}: AWQ version {self.version!r} is not known",
                hint=f"known: {[GEMM, GEMV, GEMV_FAST, LLM_AWQ]}",
            )

    @classmethod
    def detect(cls, found: Found) -> bool:
        legacy = "quant_method" not in found.raw and {"w_bit", "q_group_size"} <= found.raw.keys()
        return found.raw.get("quant_method") == "awq" or legacy

    def read(self, layer: Layer) -> PackedWeight:
        size, groups = layer.groups(self.group_size)
        sizes = _Sizes(layer.out_features, layer.in_features, size, groups)
        if sizes.k % size:
            raise layer.refuse(f"group_size {size} does not divide in_features {sizes.k}, as AWQ needs")
        read = {GEMM: self._gemm, GEMV: self._gemv}.get(self.version, self._gemv_fast)
        codes, scales, zeros = read(layer, sizes)
        return pack(layer, Parts(codes, scales, zeros), BITS, size)

    def _gemm(self, layer: Layer, z: _Sizes) -> tuple[Tensor, Tensor, Tensor]:
        layer.multiple(PER_WORD, "out_features")
        codes = unpack_gemm(layer.tensor("qweight", torch.int32, (z.k, z.n // PER_WORD)))
        zeros = unpack_gemm(layer.tensor("qzeros", torch.int32, (z.g, z.n // PER_WORD)))
        return codes.t(), layer.tensor("scales", HALVES, (z.g, z.n)).t(), zeros.t()

    def _gemv(self, layer: Layer, z: _Sizes) -> tuple[Tensor, Tensor, Tensor]:
        layer.multiple(PER_WORD, "in_features")
        width = zeros_width(z.g, z.s)
        codes = packing.unpack_floor(layer.tensor("qweight", torch.int32, (z.n, z.k // PER_WORD)), BITS, z.k)
        zeros = packing.unpack_floor(layer.tensor("qzeros", torch.int32, (z.n, width)), BITS, z.g)
        return codes, layer.tensor("scales", HALVES, (z.n, width * PER_WORD))[:, : z.g], zeros

    def _gemv_fast(self, layer: Layer, z: _Sizes) -> tuple[Tensor, Tensor, Tensor]:
        layer.multiple(4, "out_features")
        layer.multiple(64, "in_features")
        rows = zeros_width(z.g, z.s) * PER_WORD
        name = "scaled_zeros" if "scaled_zeros" in layer.headers else "qzeros"
        codes = unpack_gemv_fast(layer.tensor("qweight", torch.int16, (z.n // 4, z.k)))
        scales = layer.tensor("scales", HALVES, (rows, z.n))[: z.g].t()
        zeros = whole_zeros(scales, layer.tensor(name, HALVES, (rows, z.n))[: z.g].t())
        if zeros is None:
            raise layer.refuse(f"{name} divided by scales gives no whole zero points of 0 to 15")
        return codes, scales, zeros

    def describe(self) -> str:
        return f"AWQ {self.version}, int{16 if self.version in (GEMV_FAST, LLM_AWQ) else 32} words"

    def oddities(self) -> list[str]:
        if self.version == GEMM:
            return []
        return [
            f"the AWQ version {self.version!r} is read by few others: convert it to awq (gemm) or gptq_v2"
        ]


# --- writing -----------------------------------------------------------------------------------------------------


class AwqWriter(Writer):
    """AutoAWQ's gemm layout, which vLLM, SGLang, transformers and GPTQModel read."""

    def why_not(self, weight: QuantizedWeight) -> str | None:
        spec, scales = weight.spec, weight.scales
        return first_refusal(
            (spec.bits == BITS, f"{spec.bits} bits: AWQ has 4"),
            (not spec.desc_act, "activation order (g_idx): AWQ has no place for it"),
            *whole_and_even(spec),
            (
                torch.equal(scales.to(torch.float16).to(scales.dtype), scales),
                f"scales are {scales.dtype}, and float16, all that AWQ has, changes them",
            ),
        )

    def tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        return {
            "qweight": pack_gemm(weight.codes.t().contiguous()),
            "qzeros": pack_gemm(weight.zeros.t().contiguous()),
            "scales": weight.scales.to(torch.float16).t().contiguous(),
        }

    def config(self, summary: Summary) -> dict[str, Any]:
        usual = usual_settings(summary.specs)
        for name, spec in summary.specs.items():
            if usual.group_size not in (spec.group_size, -1 if spec.groups == 1 else spec.group_size):
                raise CheckpointError(
                    f"layer {name!r}: group_size {spec.group_size}, others have {usual.group_size}: AWQ has one",
                )
        return {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": usual.group_size,
            "zero_point": True,  # readers want zero points even where all are 8
            "version": GEMM,
            "modules_to_not_convert": list(summary.floats) or None,
            "provider": "woq",
        }
