"""What `ipex.quantization.gptq` left: a pickled state dict `gptq_checkpoint_g<group size>.pt` and no description.

The layout is neural-compressor's optimum one. The width of codes follows from the number of words, the group size stands
in the file's name and has to agree with the scales. The model's config.json has to lie beside it.
"""

from __future__ import annotations

import re
from typing import ClassVar

import torch

from woq import packing
from woq.checkpoint import GPTQ_BITS
from woq.errors import CheckpointError
from woq.interop.base import Found, Layer, Reader, pack
from woq.interop.inc import optimum
from woq.weights import PackedWeight

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
        return not found.raw and all(_FILE.match(file.name) for file in found.files)

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
        return "IPEX's gptq checkpoint: GPTQ v1, no description"
