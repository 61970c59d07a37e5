"""Writers of other libraries' layouts, made from their documentation alone: slow, one number at a time.

They know nothing of our packers: a row of codes is one big Python integer, cut into words. What they write is what a
reader must give back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Plain:
    """A quantized weight as bare numbers: W[n, k] = scales[n, g] * (codes[n, k] - zeros[n, g])."""

    bits: int
    group_size: int
    codes: Tensor  # int64 [N, K]
    scales: Tensor  # float16 [N, G]
    zeros: Tensor  # int64 [N, G]
    g_idx: Tensor  # int64 [K]

    @property
    def sym(self) -> bool:
        return bool((self.zeros == 1 << (self.bits - 1)).all())

    @property
    def trivial(self) -> bool:
        return torch.equal(self.g_idx, torch.arange(self.codes.shape[1]) // self.group_size)

    def dequantize(self) -> Tensor:
        """One weight at a time."""
        rows, columns = self.codes.shape
        weight = torch.empty(rows, columns)
        for k in range(columns):
            g = int(self.g_idx[k])
            weight[:, k] = self.scales[:, g].float() * (self.codes[:, k] - self.zeros[:, g]).float()
        return weight


def random_plain(
    out_features: int,
    in_features: int,
    *,
    bits: int = 4,
    group_size: int = 32,
    sym: bool = True,
    act_order: bool = False,
    seed: int = 0,
    least_zero: int = 0,
) -> Plain:
    """Random codes, scales of both signs, zero points that take every value."""
    generator = torch.Generator().manual_seed(seed)
    size = in_features if group_size == -1 else group_size
    groups = in_features // size
    top = 1 << bits
    codes = torch.randint(0, top, (out_features, in_features), generator=generator)
    zeros = torch.randint(least_zero, top, (out_features, groups), generator=generator)
    scales = (torch.rand(out_features, groups, generator=generator) + 0.5) / 64
    scales *= torch.where(torch.rand(out_features, groups, generator=generator) < 0.2, -1.0, 1.0)
    g_idx = torch.arange(in_features) // size
    if act_order:
        g_idx = g_idx[torch.randperm(in_features, generator=generator)]
    if sym:
        zeros = torch.full_like(zeros, top // 2)
    return Plain(bits, size, codes, scales.half(), zeros, g_idx)


# --- words -------------------------------------------------------------------------------------------------------


def signed(value: int, width: int) -> int:
    return value - (1 << width) if value >> (width - 1) else value


def bit_string(codes: Iterable[int], bits: int, width: int = 32) -> list[int]:
    """Codes as one little-endian bit string, cut into words."""
    values = list(codes)
    number = sum(int(code) << (bits * i) for i, code in enumerate(values))
    count = -(-len(values) * bits // width)
    return [signed((number >> (width * j)) & ((1 << width) - 1), width) for j in range(count)]


def in_words(codes: Iterable[int], bits: int, width: int = 32) -> list[int]:
    """As many whole codes a word as fit, the first lowest, top bits unused."""
    values, each = [int(code) for code in codes], width // bits
    chunks = [values[i : i + each] for i in range(0, len(values), each)]
    return [signed(sum(code << (bits * e) for e, code in enumerate(chunk)), width) for chunk in chunks]


Packer = Callable[[Iterable[int], int], list[int]]


def pack_columns(matrix: Tensor, bits: int, packer: Packer = bit_string) -> Tensor:
    """[L, C] -> int32 [words, C]."""
    return torch.tensor([packer(column.tolist(), bits) for column in matrix.t()], dtype=torch.int32).t()


def pack_rows(matrix: Tensor, bits: int, packer: Packer = bit_string) -> Tensor:
    """[R, L] -> int32 [R, words]."""
    return torch.tensor([packer(row.tolist(), bits) for row in matrix], dtype=torch.int32)


# --- formats -----------------------------------------------------------------------------------------------------


def gptq(w: Plain, offset: int) -> dict[str, Tensor]:
    """AutoGPTQ's tensors; offset 1 is v1 (z - 1 field by field), 0 is v2."""
    stored = (w.zeros - offset) % (1 << w.bits)
    return {
        "qweight": pack_columns(w.codes.t(), w.bits),
        "qzeros": pack_rows(stored.t(), w.bits),
        "scales": w.scales.t().contiguous(),
        "g_idx": w.g_idx.to(torch.int32),
    }


def gptqmodel_v1(w: Plain) -> dict[str, Tensor]:
    """GPTQModel's export to v1: 1 in every field subtracted from whole 32-bit words."""
    v2 = gptq(w, 0)
    ones = bit_string([1] * 32, w.bits)
    if w.bits == 3:  # as its source has them: three words in turn
        ones = [
            0b00100100100100100100100100100100,
            0b10010010010010010010010010010010,
            0b01001001001001001001001001001001,
        ]
    words = v2["qzeros"].tolist()
    subtracted = [
        [signed((word - ones[j % len(ones)]) % (1 << 32), 32) for j, word in enumerate(row)] for row in words
    ]
    return {**v2, "qzeros": torch.tensor(subtracted, dtype=torch.int32)}


def awq_words(row: Iterable[int], bits: int) -> list[int]:
    """Eight nibbles a word: nibble i is column AWQ_ORDER[i]."""
    values = list(row)
    chunks = [values[i : i + 8] for i in range(0, len(values), 8)]
    return [signed(sum(int(chunk[AWQ_ORDER[i]]) << (4 * i) for i in range(8)), 32) for chunk in chunks]


def awq_gemm(w: Plain) -> dict[str, Tensor]:
    return {
        "qweight": pack_rows(w.codes.t(), 4, awq_words),
        "qzeros": pack_rows(w.zeros.t(), 4, awq_words),
        "scales": w.scales.t().contiguous(),
    }


def awq_zeros_width(groups: int, group_size: int) -> int:
    words = -(-groups // 8)
    multiple = {64: 2, 32: 4}.get(group_size, 1)
    return -(-words // multiple) * multiple


def awq_gemv(w: Plain) -> dict[str, Tensor]:
    rows, groups = w.zeros.shape
    width = awq_zeros_width(groups, w.group_size)
    zeros, scales = torch.zeros(rows, width * 8, dtype=torch.int64), torch.zeros(rows, width * 8)
    zeros[:, :groups], scales[:, :groups] = w.zeros, w.scales.float()
    return {"qweight": pack_rows(w.codes, 4), "qzeros": pack_rows(zeros, 4), "scales": scales.half()}


def awq_gemv_fast(w: Plain) -> dict[str, Tensor]:
    """As AutoAWQ's gemv_fast documents it: two reorderings in a run of 32, four rows interleaved by runs of 64."""
    rows, columns = w.codes.shape
    order = []
    for start in range(0, columns, 32):
        run = [start + 8 * b + 2 * a + c for a in range(4) for b in range(4) for c in range(2)]
        for eight in range(0, 32, 8):
            order += [run[eight + i] for i in AWQ_ORDER]
    reordered = [[int(w.codes[n, k]) for k in order] for n in range(rows)]
    words = []
    for quad in range(0, rows, 4):
        line = []
        for start in range(0, columns, 64):
            stream = [reordered[quad + r][start + k] for r in range(4) for k in range(64)]
            line += in_words(stream, 4, 16)
        words.append(line)
    groups = w.zeros.shape[1]
    height = awq_zeros_width(groups, w.group_size) * 8
    scales, scaled = torch.zeros(height, rows), torch.zeros(height, rows)
    scales[:groups] = w.scales.t().float()
    scaled[:groups] = -(w.scales.float() * w.zeros).t()
    return {
        "qweight": torch.tensor(words, dtype=torch.int16),
        "qzeros": scaled.half(),
        "scales": scales.half(),
    }


def compressed_tensors(w: Plain, packer: Packer = bit_string) -> dict[str, Tensor]:
    """pack-quantized; `in_words` is the packing before 0.18."""
    tensors = {
        "weight_packed": pack_rows(w.codes, w.bits, packer),
        "weight_scale": w.scales,
        "weight_shape": torch.tensor(list(w.codes.shape)),
    }
    if not w.sym:
        tensors["weight_zero_point"] = pack_columns(w.zeros, w.bits, packer)
    if not w.trivial:
        tensors["weight_g_idx"] = w.g_idx.to(torch.int32)
    return tensors


def auto_round_words_minus_one(w: Plain) -> dict[str, Tensor]:
    """auto-round's auto_gptq packer: zero points minus 1, summed into words without a mask; 3 bits field by field. No g_idx."""
    tensors = gptq(w, 1) if w.bits == 3 else gptqmodel_v1(w)
    del tensors["g_idx"]
    return tensors


def inc_optimum(w: Plain) -> dict[str, Tensor]:
    """neural-compressor's optimum layout: whole codes a word, zero points minus 1, a g_idx and a bias always."""
    rows, columns = w.codes.shape
    stored = (w.zeros - 1) % (1 << w.bits)
    return {
        "qweight": pack_columns(w.codes.t(), w.bits, in_words),
        "qzeros": pack_rows(stored.t(), w.bits, in_words),
        "scales": w.scales.t().contiguous(),
        "g_idx": torch.zeros(columns, dtype=torch.int32) if w.trivial else w.g_idx.to(torch.int32),
        "bias": torch.zeros(rows, dtype=torch.float16),
        "scale_bf16_to_fp8": torch.ones(1, dtype=torch.bfloat16),
    }


def inc_plain(w: Plain, width: int, dim: int) -> dict[str, Tensor]:
    """neural-compressor's plain layout: signed codes and no zero points where symmetric."""
    dtype = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[width]

    def packed(matrix: Tensor) -> Tensor:
        along = matrix if dim == 1 else matrix.t()
        words = torch.tensor([in_words(row.tolist(), w.bits, width) for row in along], dtype=dtype)
        return words if dim == 1 else words.t()

    if not w.sym:
        return {"qweight": packed(w.codes), "qzeros": packed(w.zeros), "scales": w.scales.float()}
    signed_codes = (w.codes - (1 << (w.bits - 1))) % (1 << w.bits)
    return {"qweight": packed(signed_codes), "scales": w.scales.float()}
