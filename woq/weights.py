"""The two forms of a quantized weight, and the way between them.

`QuantizedWeight` is what an algorithm returns: one byte per code, easy to compute with, the same for every layout.
`PackedWeight` is what stands in a checkpoint. Everything else in the package handles one of the two.

    W[n, k] = scales[n, g(k)] * (codes[n, k] - zeros[n, g(k)])          codes and zeros unsigned, 0 .. 2^bits-1

with g(k) = k // group_size, or g_idx[k] where GPTQ's activation order (`desc_act`) assigned the groups.
Layouts are specified in docs/format.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from woq import packing
from woq.errors import CheckpointError

Packing = Literal["gptq", "inc_plain"]


@dataclass(frozen=True)
class Layout:
    """How codes and zero points are laid out in words.

    packing:            "gptq": int32, dense, along in_features, transposed to [K, N];
                        "inc_plain": neural-compressor's [N, K] layout with a free word type and dimension
    zero_offset:        what is subtracted from a zero point before it is stored, modulo 2^bits: 1 in GPTQ's v1
                        checkpoints, 0 in v2 and in the plain layout
    compression_dtype:  the word: int32 for "gptq", any of int8, int16, int32, int64 for "inc_plain"
    compression_dim:    1 packs along in_features, 0 along out_features; 1 for "gptq"
    """

    packing: Packing = "gptq"
    zero_offset: Literal[0, 1] = 0
    compression_dtype: torch.dtype = torch.int32
    compression_dim: Literal[0, 1] = 1


GPTQ_V1 = Layout(zero_offset=1)
GPTQ_V2 = Layout(zero_offset=0)


@dataclass(frozen=True)
class WeightSpec:
    """All that must be known of a quantized linear to allocate it, check it, and pick a backend for it.

    group_size is resolved: 1 .. in_features, never -1. A group size that does not divide in_features leaves a
    short last group. `desc_act` says that a g_idx is present and is not k // group_size.
    """

    in_features: int
    out_features: int
    bits: int
    group_size: int
    sym: bool
    desc_act: bool = False
    scale_dtype: torch.dtype = torch.float16
    layout: Layout = field(default=GPTQ_V2)

    @property
    def groups(self) -> int:
        """Number of groups along in_features."""
        return -(-self.in_features // self.group_size)

    def packed_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor a checkpoint must hold for this weight (bias aside)."""
        n, k, g, lay = self.out_features, self.in_features, self.groups, self.layout
        if lay.packing == "gptq":
            return {
                "qweight": ((packing.dense_words(k, self.bits), n), torch.int32),
                "qzeros": ((g, packing.dense_words(n, self.bits)), torch.int32),
                "scales": ((g, n), self.scale_dtype),
                "g_idx": ((k,), torch.int32),
            }
        word = lay.compression_dtype
        if lay.compression_dim == 1:
            weight = (n, packing.floor_words(k, self.bits, word))
            zeros = (n, packing.floor_words(g, self.bits, word))
        else:
            rows = packing.floor_words(n, self.bits, word)
            weight, zeros = (rows, k), (rows, g)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]
        shapes = {
            "qweight": (weight, word),
            "qzeros": (zeros, word),
            "scales": ((n, g), self.scale_dtype),
        }
        if self.desc_act:
            shapes["g_idx"] = ((k,), torch.int32)
        return shapes


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """Integer codes with their scales and zero points: one linear's weight, independent of device and layout.

    codes:  uint8 [N, K], 0 .. 2^bits-1      zeros: uint8 [N, G], 0 .. 2^bits-1
    scales: float [N, G] in the dtype they are stored in (round before computing codes); may be negative
    g_idx:  int32 [K], the group of each input feature, or None for k // group_size
    """

    spec: WeightSpec
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor | None = None

    def groups_of_inputs(self) -> Tensor:
        """int64 [K]: the group of every input feature."""
        if self.g_idx is not None:
            return self.g_idx.to(torch.int64)
        return torch.arange(self.spec.in_features, device=self.codes.device) // self.spec.group_size

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight [N, K]. Computed in float32, rounded once to `dtype`."""
        spec = self.spec
        if self.g_idx is None and spec.in_features % spec.group_size == 0:
            codes = self.codes.view(spec.out_features, spec.groups, spec.group_size)
            scales, zeros = self.scales.float().unsqueeze(-1), self.zeros.unsqueeze(-1)
        else:
            g = self.groups_of_inputs()
            codes, scales, zeros = self.codes, self.scales.float()[:, g], self.zeros[:, g]
        weight = (codes.float() - zeros.float()) * scales
        return weight.reshape(spec.out_features, spec.in_features).to(dtype)

    def pack(self) -> PackedWeight:
        """Lay the weight out as `spec.layout` says."""
        spec, lay = self.spec, self.spec.layout
        g_idx: Tensor | None
        stored_zeros = (self.zeros.to(torch.int16) - lay.zero_offset).bitwise_and_((1 << spec.bits) - 1)
        if lay.packing == "gptq":
            qweight = packing.pack_dense(self.codes.t(), spec.bits)
            qzeros = packing.pack_dense(stored_zeros, spec.bits).t()  # along N: rows of [N, G], then turned
            scales = self.scales.t()
            g_idx = self.groups_of_inputs().to(torch.int32)  # always written: readers disagree on its absence
        else:
            qweight, qzeros = (self._pack_plain(t) for t in (self.codes, stored_zeros))
            scales = self.scales
            # A layer that was to be ordered but was not (a fallback) still has the tensor its spec promises.
            g_idx = self.groups_of_inputs().to(torch.int32) if spec.desc_act else None
        return PackedWeight(
            spec=spec,
            qweight=qweight.contiguous(),
            qzeros=qzeros.contiguous(),
            scales=scales.to(spec.scale_dtype).contiguous(),
            g_idx=g_idx,
        )

    def _pack_plain(self, codes: Tensor) -> Tensor:
        lay = self.spec.layout
        if lay.compression_dim == 1:
            return packing.pack_floor(codes, self.spec.bits, lay.compression_dtype)
        return packing.pack_floor(codes.t(), self.spec.bits, lay.compression_dtype).t()


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight as it stands in a checkpoint; `spec.packed_shapes()` gives each tensor's shape and dtype."""

    spec: WeightSpec
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None = None

    @classmethod
    def from_tensors(cls, spec: WeightSpec, tensors: dict[str, Tensor], name: str) -> PackedWeight:
        """Build from the tensors of layer `name`.

        Raises CheckpointError where a tensor is missing, or its shape or dtype is not what `spec` implies.
        """
        for key, (shape, dtype) in spec.packed_shapes().items():
            if key not in tensors:
                raise CheckpointError(f"layer {name!r}: tensor {key!r} is missing; found {sorted(tensors)}")
            got = tensors[key]
            if tuple(got.shape) != shape or got.dtype != dtype:
                raise CheckpointError(
                    f"layer {name!r}: {key} is {got.dtype} {list(got.shape)}, expected {dtype} {list(shape)} "
                    f"for {spec.bits} bits, group size {spec.group_size}"
                )
        known = {key: tensors[key] for key in spec.packed_shapes()}
        return cls(spec=spec, **known)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names in a checkpoint."""
        named = {"qweight": self.qweight, "qzeros": self.qzeros, "scales": self.scales, "g_idx": self.g_idx}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight on another device (no copy where it is there already)."""
        return PackedWeight(self.spec, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def unpack(self) -> QuantizedWeight:
        """Codes, scales and zero points, whatever the layout. g_idx is dropped where it says k // group_size."""
        spec, lay = self.spec, self.spec.layout
        n, k, g = spec.out_features, spec.in_features, spec.groups
        if lay.packing == "gptq":
            codes = packing.unpack_dense(self.qweight, spec.bits, k).t()
            stored_zeros = packing.unpack_dense(self.qzeros.t(), spec.bits, n)
            scales = self.scales.t()
        else:
            codes, stored_zeros = self._unpack_plain(self.qweight, k), self._unpack_plain(self.qzeros, g)
            scales = self.scales
        zeros = (stored_zeros + lay.zero_offset).bitwise_and_((1 << spec.bits) - 1)
        return QuantizedWeight(
            spec=spec,
            codes=codes.contiguous(),
            scales=scales.contiguous(),
            zeros=zeros.contiguous(),
            g_idx=self.g_idx if spec.desc_act else None,
        )

    def _unpack_plain(self, words: Tensor, columns: int) -> Tensor:
        spec = self.spec
        if spec.layout.compression_dim == 1:
            return packing.unpack_floor(words, spec.bits, columns)
        return packing.unpack_floor(words.t().contiguous(), spec.bits, spec.out_features).t()
