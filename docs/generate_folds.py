"""Write the generated table of docs/folds.md: `python docs/generate_folds.py`. A test fails where it is stale.

Random tiny models of many architectures (tests/tiny_models.py) are asked block by block which folds they have.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

PAGE = Path(__file__).with_name("folds.md")
BEGIN, END = "<!-- generated: architectures -->\n", "<!-- end -->"


def rows() -> list[list[str]]:
    """Architecture, a fold or a linear, what was found."""
    from tests.test_folds import ARCHITECTURES, all_folds, prepared
    from woq.folds import FoldFinder

    lines = []
    for arch in ARCHITECTURES:
        _, blocks, _, inputs = prepared(arch)
        found = all_folds(blocks, inputs, FoldFinder({}))[-1]
        kept: dict[str, None] = {}
        for fold in found.kept:
            takers = [_own(name) for name in (*fold.consumers, *fold.parameters)]
            note = {"norm": "", "rows": "", "offset norm": " (1 + weight)"}[fold.form]
            if not torch.equal(fold.source, torch.arange(len(fold.source))):
                note += f" (shared: {len(fold.source)} features, {fold.channels} scales)"
            kept[f"{_own(fold.producer)} -> {', '.join(dict.fromkeys(takers))}{note}"] = None
        refused = dict.fromkeys(f"{_own(name)}: {reason}" for name, reason in found.refused.items())
        lines.append([arch, "<br>".join(kept), "<br>".join(refused) or "-"])
    return lines


def _own(name: str) -> str:
    """The name without what leads to it; a parameter keeps its module's."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return ".".join(parts[-2:]) if parts[-1] == "weight" else parts[-1]


def generate(page: str) -> str:
    """`page` with its table made anew."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} lacks {BEGIN!r} or {END!r}")
    head = [["architecture", "folds that were proven", "left as it is, and why"], ["---"] * 3]
    table = "".join(f"| {' | '.join(line)} |\n" for line in [*head, *rows()])
    return f"{before}{begin}\n{table}\n{end}{after}"


if __name__ == "__main__":
    sys.path.insert(0, str(PAGE.parents[1]))
    PAGE.write_text(generate(PAGE.read_text()))
