"""What a quantization run did, layer by layer: kept beside the checkpoint as CSV and JSON."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from woq.configs import QuantConfig
from woq.plan import Choice, Plan


@dataclass(frozen=True)
class LayerReport:
    """One quantized linear. loss, tokens, damping and note as in `algorithms.base.LayerResult`; seconds of its block
    shared evenly among the block's layers."""

    layer: str
    bits: int
    group_size: int
    sym: bool
    loss: float
    tokens: int | None
    damping: float | None
    seconds: float
    note: str


@dataclass
class Report:
    """A whole run."""

    config: QuantConfig  # what was done: a width for every layer, also where bits were to be chosen
    plan: Plan
    device: str
    calibration: str = "none"
    layers: list[LayerReport] = field(default_factory=list)
    seconds: float = 0.0
    mixed_precision: Choice | None = None
    untied_head: bool = False  # the output head shared the embeddings' weight and was given its own

    @property
    def notes(self) -> list[str]:
        """Layers where something departed from the usual path."""
        return [f"{layer.layer}: {layer.note}" for layer in self.layers if layer.note]

    @property
    def note_counts(self) -> dict[str, int]:
        """How many layers each note was made of: a model of many experts has too many notes to read."""
        return dict(Counter(layer.note for layer in self.layers if layer.note))

    def to_dict(self) -> dict[str, Any]:
        """The summary, without the layers."""
        return {
            "device": self.device,
            "calibration": self.calibration,
            "seconds": round(self.seconds, 2),
            "layers": len(self.layers),
            "coverage": self.plan.coverage,
            "mixed_precision": None if self.mixed_precision is None else asdict(self.mixed_precision),
            "skipped": self.plan.skipped,
            "adjusted": self.plan.adjusted,
            "note_counts": self.note_counts,
            "notes": self.notes,
        }

    def write_csv(self, path: Path) -> None:
        """One row a layer."""
        with path.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, [f.name for f in fields(LayerReport)])
            writer.writeheader()
            writer.writerows(asdict(layer) for layer in self.layers)
