"""The two forms of a quantized weight, and the way between them.

`QuantizedWeight` is what an algorithm returns: one byte per code, easy to compute with, the same for every layout.
`PackedWeight` is what stands in a checkpoint. Everything else in the package handles one of the two.

    W[n, k] = scales[n, g(k)] * (value(codes[n, k]) - zeros[n, g(k)])

with g(k) = k // group_size, or g_idx[k] where GPTQ's activation order (`desc_act`) assigned the groups. The data type
says what a code and a zero point are:

    "int"               value(c) = c; zeros are whole numbers 0 .. 2^bits-1
    "int_float_zeros"   value(c) = c; zeros are floats in the dtype of the scales (HQQ)
    "nf4", "fp4", "fp4_e2m1"    value(c) is looked up in a table (woq/codebooks.py); there are no zero points

Scales may be stored as codes themselves (`double_quant`, woq/scales.py): a matter of storage that `unpack` undoes.
Layouts are specified in docs/format.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal, get_args

import torch
from torch import Tensor

from woq import codebooks, packing
from woq.errors import CheckpointError
from woq.scales import DoubleQuant, ScaleCodes

Packing = Literal["gptq", "inc_plain"]
DataType = Literal["int", "int_float_zeros", "nf4", "fp4", "fp4_e2m1"]
DATA_TYPES: tuple[DataType, ...] = get_args(DataType)
CODEBOOKS = tuple(name for name in DATA_TYPES if name in codebooks.VALUES)


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
    short last group. `desc_act` says that a g_idx is present and is not k // group_size. `sym`: every zero point is
    2^(bits-1), or there is none (codebooks). `scale_dtype` is that of the scales one computes with, stored as they are
    or as `double_quant` says.
    """

    in_features: int
    out_features: int
    bits: int
    group_size: int
    sym: bool
    desc_act: bool = False
    scale_dtype: torch.dtype = torch.float16
    layout: Layout = field(default=GPTQ_V2)
    data_type: DataType = "int"
    double_quant: DoubleQuant | None = None

    @property
    def is_codebook(self) -> bool:
        """Whether codes are looked up in a table."""
        return self.data_type in CODEBOOKS

    @property
    def groups(self) -> int:
        """Number of groups along in_features."""
        return -(-self.in_features // self.group_size)

    def packed_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor a checkpoint must hold for this weight (bias aside)."""
        n, k, lay = self.out_features, self.in_features, self.layout
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]
        if lay.packing == "gptq":
            shapes = {"qweight": ((packing.dense_words(k, self.bits), n), torch.int32)}
        elif lay.compression_dim == 1:
            word = lay.compression_dtype
            shapes = {"qweight": ((n, packing.floor_words(k, self.bits, word)), word)}
        else:
            word = lay.compression_dtype
            shapes = {"qweight": ((packing.floor_words(n, self.bits, word), k), word)}
        shapes |= self._zero_shapes() | self._scale_shapes()
        if self.desc_act or lay.packing == "gptq":
            shapes["g_idx"] = ((k,), torch.int32)
        return shapes

    def _zero_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        n, g, lay = self.out_features, self.groups, self.layout
        if self.is_codebook:
            return {}
        if self.data_type == "int_float_zeros":
            return {"zeros": ((g, n) if lay.packing == "gptq" else (n, g), self.scale_dtype)}
        if lay.packing == "gptq":
            return {"qzeros": ((g, packing.dense_words(n, self.bits)), torch.int32)}
        word = lay.compression_dtype
        if lay.compression_dim == 1:
            return {"qzeros": ((n, packing.floor_words(g, self.bits, word)), word)}
        return {"qzeros": ((packing.floor_words(n, self.bits, word), g), word)}

    def _scale_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        n, g, double = self.out_features, self.groups, self.double_quant
        if double is None:
            return {"scales": ((g, n) if self.layout.packing == "gptq" else (n, g), self.scale_dtype)}
        runs = (double.groups(n * g),)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "qscales": ((packing.dense_words(n * g, double.bits),), torch.int32),
            "scale_steps": (runs, torch.float32),
        }
        return shapes if double.sym else shapes | {"scale_offsets": (runs, torch.float32)}


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """Codes with their scales and zero points: one linear's weight, independent of device and layout.

    codes:  uint8 [N, K], 0 .. 2^bits-1
    scales: float [N, G] in `spec.scale_dtype`, as they will be read (round before computing codes); may be negative
    zeros:  uint8 [N, G], 0 .. 2^bits-1; float [N, G] in `spec.scale_dtype` where the data type has float zeros; for a
            codebook uint8 and all 0, and not stored
    g_idx:  int32 [K], the group of each input feature, or None for k // group_size
    scale_codes: what is stored of the scales where `spec.double_quant` is set: `scales` is what it decodes to
    """

    spec: WeightSpec
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor | None = None
    scale_codes: ScaleCodes | None = None

    def groups_of_inputs(self) -> Tensor:
        """int64 [K]: the group of every input feature."""
        if self.g_idx is not None:
            return self.g_idx.to(torch.int64)
        return torch.arange(self.spec.in_features, device=self.codes.device) // self.spec.group_size

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight [N, K]. Computed in float32, rounded once to `dtype`."""
        spec = self.spec
        if spec.is_codebook:
            values = codebooks.table(spec.data_type, self.codes)[self.codes.to(torch.int32)]
        else:
            values = self.codes.float()
        if self.g_idx is None and spec.in_features % spec.group_size == 0:
            values = values.view(spec.out_features, spec.groups, spec.group_size)
            scales, zeros = self.scales.float().unsqueeze(-1), self.zeros.unsqueeze(-1)
        else:
            g = self.groups_of_inputs()
            scales, zeros = self.scales.float()[:, g], self.zeros[:, g]
        weight = (values - zeros.float()) * scales
        return weight.reshape(spec.out_features, spec.in_features).to(dtype)

    def pack(self) -> PackedWeight:
        """Lay the weight out as `spec.layout` says."""
        spec = self.spec
        tensors = {"qweight": self._pack_codes(self.codes)} | self._pack_zeros() | self._pack_scales()
        # GPTQ readers disagree on a missing g_idx. And a layer that was to be ordered but was not (a fallback) still
        # has the tensor its spec promises.
        if spec.desc_act or spec.layout.packing == "gptq":
            tensors["g_idx"] = self.groups_of_inputs().to(torch.int32)
        return PackedWeight(spec, **{name: tensor.contiguous() for name, tensor in tensors.items()})

    def _pack_codes(self, codes: Tensor) -> Tensor:
        spec, lay = self.spec, self.spec.layout
        if lay.packing == "gptq":
            return packing.pack_dense(codes.t(), spec.bits)
        if lay.compression_dim == 1:
            return packing.pack_floor(codes, spec.bits, lay.compression_dtype)
        return packing.pack_floor(codes.t(), spec.bits, lay.compression_dtype).t()

    def _pack_zeros(self) -> dict[str, Tensor]:
        spec, lay = self.spec, self.spec.layout
        if spec.is_codebook:
            return {}
        if spec.data_type == "int_float_zeros":
            zeros = self.zeros.to(spec.scale_dtype)
            return {"zeros": zeros.t() if lay.packing == "gptq" else zeros}
        stored = (self.zeros.to(torch.int16) - lay.zero_offset).bitwise_and_((1 << spec.bits) - 1)
        if lay.packing == "gptq":
            return {
                "qzeros": packing.pack_dense(stored, spec.bits).t()
            }  # along N: rows of [N, G], then turned
        return {"qzeros": self._pack_codes(stored)}

    def _pack_scales(self) -> dict[str, Tensor]:
        spec, coded = self.spec, self.scale_codes
        if spec.double_quant is None:
            scales = self.scales.to(spec.scale_dtype)
            return {"scales": scales.t() if spec.layout.packing == "gptq" else scales}
        if coded is None:
            raise ValueError("a weight whose spec has double_quant needs scale_codes")
        words = packing.pack_dense(coded.codes.reshape(-1, 1), spec.double_quant.bits).flatten()
        parts = {"qscales": words, "scale_steps": coded.steps}
        return parts if coded.offsets is None else parts | {"scale_offsets": coded.offsets}


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight as it stands in a checkpoint; `spec.packed_shapes()` says which tensors it has, their shapes and dtypes."""

    spec: WeightSpec
    qweight: Tensor
    qzeros: Tensor | None = None
    scales: Tensor | None = None
    g_idx: Tensor | None = None
    zeros: Tensor | None = None
    qscales: Tensor | None = None
    scale_steps: Tensor | None = None
    scale_offsets: Tensor | None = None

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
        named = {name: getattr(self, name) for name in TENSORS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight on another device (no copy where it is there already)."""
        return PackedWeight(self.spec, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def unpack(self) -> QuantizedWeight:
        """Codes, scales and zero points, whatever the layout. g_idx is dropped where it says k // group_size."""
        spec, coded = self.spec, self._scale_codes()
        return QuantizedWeight(
            spec=spec,
            codes=self._unpack_codes(self.qweight, spec.in_features).contiguous(),
            scales=self.decoded_scales().contiguous(),
            zeros=self.decoded_zeros().contiguous(),
            g_idx=self.g_idx if spec.desc_act else None,
            scale_codes=coded,
        )

    def decoded_scales(self) -> Tensor:
        """The scales [N, G] in `spec.scale_dtype`, however they are stored."""
        spec, coded = self.spec, self._scale_codes()
        if coded is not None and spec.double_quant is not None:
            return coded.decode(spec.double_quant, spec.scale_dtype)
        scales = _present(self.scales)
        return scales.t() if spec.layout.packing == "gptq" else scales

    def _scale_codes(self) -> ScaleCodes | None:
        spec, double = self.spec, self.spec.double_quant
        if double is None:
            return None
        count = spec.out_features * spec.groups
        codes = packing.unpack_dense(_present(self.qscales).unsqueeze(1), double.bits, count)
        return ScaleCodes(
            codes.view(spec.out_features, spec.groups), _present(self.scale_steps), self.scale_offsets
        )

    def _unpack_codes(self, words: Tensor, columns: int) -> Tensor:
        spec = self.spec
        if spec.layout.packing == "gptq":
            return packing.unpack_dense(words, spec.bits, columns).t()
        if spec.layout.compression_dim == 1:
            return packing.unpack_floor(words, spec.bits, columns)
        return packing.unpack_floor(words.t().contiguous(), spec.bits, spec.out_features).t()

    def decoded_zeros(self) -> Tensor:
        """The zero points [N, G], uint8 or (`int_float_zeros`) float."""
        spec, lay = self.spec, self.spec.layout
        if spec.is_codebook:
            shape = (spec.out_features, spec.groups)
            return torch.zeros(shape, dtype=torch.uint8, device=self.qweight.device)
        if spec.data_type == "int_float_zeros":
            zeros = _present(self.zeros)
            return zeros.t() if lay.packing == "gptq" else zeros
        words = _present(self.qzeros)
        if lay.packing == "gptq":
            stored = packing.unpack_dense(words.t(), spec.bits, spec.out_features)
        else:
            stored = self._unpack_codes(words, spec.groups)
        return (stored + lay.zero_offset).bitwise_and_((1 << spec.bits) - 1)


TENSORS = tuple(f.name for f in fields(PackedWeight) if f.name != "spec")
"""Every name that a tensor of a quantized layer may have in a checkpoint, the bias aside."""


def _present(tensor: Tensor | None) -> Tensor:
    """`from_tensors` has checked that a weight holds what its spec says."""
    assert tensor is not None
    return tensor
