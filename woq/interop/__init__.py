"""Other libraries' checkpoints: one file per format, one line here.

`READERS` are asked in order whether a folder is theirs; `TARGETS` are what `woq convert` writes. A format's module is
imported when a quantized folder is opened, never before.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from woq.errors import CheckpointError

if TYPE_CHECKING:
    from woq.interop.base import Found, Reader

# The first that knows a folder reads it: those with a mark of their own come before those told by few keys.
READERS: dict[str, str] = {
    "compressed-tensors": "woq.interop.compressed_tensors:CompressedTensorsReader",
    "auto-round": "woq.interop.auto_round:AutoRoundReader",
    "inc": "woq.interop.inc:IncReader",
    "inc-torch": "woq.interop.inc:IncTorchReader",
    "ipex": "woq.interop.ipex:IpexReader",
    "bitsandbytes": "woq.interop.bitsandbytes:FourBitReader",
    "bitsandbytes-int8": "woq.interop.bitsandbytes:Int8Reader",
    "hqq": "woq.interop.hqq:HqqReader",
    "torchao": "woq.interop.torchao:TorchAoReader",
    "awq": "woq.interop.awq:AwqReader",
    "gptq": "woq.interop.gptq:GptqReader",
}


@dataclass(frozen=True)
class Target:
    """What `woq convert --to` names. A writer stores layers in safetensors beside a config; an exporter writes all itself,
    in place or not at all, and returns the layers that it read back and compared:
    `export(source: woq.interop.convert.Source, target: Path, *, overwrite: bool) -> tuple[str, ...]`."""

    writer: str | None = None
    exporter: str | None = None


TARGETS: dict[str, Target] = {
    "onnx": Target(exporter="woq.export.onnx:exporter"),
    "gptq": Target(writer="woq.interop.gptq:v1"),
    "gptq_v2": Target(writer="woq.interop.gptq:v2"),
    "awq": Target(writer="woq.interop.awq:AwqWriter"),
    "compressed-tensors": Target(writer="woq.interop.compressed_tensors:CompressedTensorsWriter"),
    "auto-round": Target(writer="woq.interop.auto_round:AutoRoundWriter"),
    "gguf": Target(exporter="woq.interop.gguf_writer:export"),
}


def load(path: str) -> Any:
    """What "module:name" names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def find(folder: Path) -> Found | None:
    """What says that `folder` is quantized; None for a float one. Raises CheckpointError where that is malformed."""
    from woq.interop.files import find

    return find(folder)


def reader_of(found: Found) -> Reader:
    """The reader of a folder's format. Raises CheckpointError where none knows it, or its description is malformed."""
    for path in READERS.values():
        cls: type[Reader] = load(path)
        if cls.detect(found):
            return cls(found)
    raise CheckpointError(
        f"{found.where}: quant_method {found.raw.get('quant_method')!r} is not known",
        hint=f"known: {', '.join(READERS)}",
    )
