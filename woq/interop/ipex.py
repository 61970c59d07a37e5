"""What `ipex.quantization.gptq` writes: a pickled state dict `gptq_checkpoint_g<group size>.pt`, without a description.

The layout is neural-compressor's optimum one. The width of codes follows from the number of words, the group size stands
in the file's name and has to agree with the scales. The model's config.json has to lie beside it; ours, written by
`woq.compat.ipex`, bring it.
"""

from __future__ import annotations

import re
from typing import ClassVar

import torch
from torch import Tensor

from woq import packing
from woq.checkpoint import GPTQ_BITS
from woq.errors import CheckpointError
from woq.interop.base import Found, Layer, Reader, first_refusal, pack
from woq.interop.inc import optimum
from woq.weights import PackedWeight, QuantizedWeight

_FILE = re.compile(r"gptq_checkpoint_g(-?\d+)\.pt$")


class IpexReader(Reader):
    """A `gptq_checkpoint_g*.pt` beside a config.json."""

    format: ClassVar[str] = "ipex"
    ignored: ClassVar[tuple[str, ...]] = ("scale_bf16_to_fp8",)

    def __init__(self, found: Found) -> None:
        super().__init__(found)
        if len(found.files) != 1:
            raise CheckpointError(
                f"{found.folder} holds several checkpoints: {[f.name for f in found.files]}", hint="leave one"
            )
        match = _FILE.match(found.files[0].name)
        if match is None:
            raise CheckpointError(f"{found.files[0]}: the name does not say the group size")
        self.group_size = int(match[1])

    @classmethod
    def detect(cls, found: Found) -> bool:
        return bool(found.files) and all(_FILE.match(file.name) for file in found.files)

    def read(self, layer: Layer) -> PackedWeight:
        words = layer.tensor("qweight", torch.int32)
        widths = [
            bits
            for bits in GPTQ_BITS
            if words.shape[0] == packing.floor_words(layer.in_features, bits, torch.int32)
        ]
        if len(widths) != 1:
            raise layer.refuse(
                f"qweight is {list(words.shape)}: {layer.in_features} codes of {widths or 'no'} bits"
            )
        size, _ = layer.groups(self.group_size)
        return pack(layer, optimum(layer, widths[0], self.group_size), widths[0], size)

    def describe(self) -> str:
        return "IPEX's gptq checkpoint: GPTQ v1, told by its file"


# --- writing -----------------------------------------------------------------------------------------------------


def file_name(group_size: int) -> str:
    """What IPEX calls a checkpoint."""
    return f"gptq_checkpoint_g{group_size}.pt"


def why_not(weight: QuantizedWeight) -> str | None:
    """None where IPEX's loader reads this very weight, else the condition that it fails."""
    spec = weight.spec
    return first_refusal(
        (spec.data_type == "int", f"the data type {spec.data_type!r}: only whole numbers can be told"),
        (spec.bits == 4, f"{spec.bits} bits: IPEX reads 4"),
        (spec.in_features % 8 == 0, f"in_features {spec.in_features} is no multiple of 8"),
        (spec.out_features % 8 == 0, f"out_features {spec.out_features} is no multiple of 8"),
        (spec.in_features % spec.group_size == 0, f"group_size {spec.group_size} leaves a short last group"),
    )


def to_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    """qweight int32 [K/8, N], qzeros int32 [G, N/8] holding (zero - 1) modulo 16, scales [G, N]; g_idx int32 [K] under
    act-order alone."""
    bits = weight.spec.bits
    stored = (weight.zeros.to(torch.int32) - 1).bitwise_and_((1 << bits) - 1)
    tensors = {
        "qweight": packing.pack_floor(weight.codes, bits, torch.int32).t().contiguous(),
        "qzeros": packing.pack_floor(stored.t().contiguous(), bits, torch.int32),
        "scales": weight.scales.t().contiguous(),
    }
    return tensors if weight.g_idx is None else tensors | {"g_idx": weight.g_idx}
