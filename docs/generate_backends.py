"""Write the generated parts of docs/backends.md: `python docs/generate_backends.py`. A test fails where they are stale.

What a backend supports is asked of its `why_not`, as on a machine that has the device and all the backend needs; what has
run on hardware is read from docs/backends_ran.json, and everything that is not in there has not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

from woq.backends import BACKENDS, Entry, load
from woq.backends.base import Target
from woq.device import DEVICES
from woq.weights import GPTQ_V1, GPTQ_V2, WeightSpec

PAGE = Path(__file__).with_name("backends.md")
RAN = Path(__file__).with_name("backends_ran.json")
BEGIN, END = "<!-- generated: {} -->\n", "<!-- end -->"

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BITS = range(2, 9)
_GROUP = WeightSpec(4096, 4096, bits=4, group_size=128, sym=True, layout=GPTQ_V1)
LAYERS: dict[str, WeightSpec] = {
    "group 128": _GROUP,
    "group 128, asymmetric": replace(_GROUP, sym=False, layout=GPTQ_V2),
    "group 128, act-order": replace(_GROUP, desc_act=True),
    "group 32": replace(_GROUP, group_size=32),
    "group 16": replace(_GROUP, group_size=16),
    "group 100, the last one short": replace(_GROUP, group_size=100),
    "per channel": replace(_GROUP, group_size=4096),
    "per channel, asymmetric": replace(_GROUP, group_size=4096, sym=False, layout=GPTQ_V2),
}


@contextmanager
def everything_there() -> Iterator[None]:
    """The probes of the backends answer as on a machine with every device and library."""
    with ExitStack() as stack:
        for probe, answer in {
            "woq.backends.xpu.has_kernel": True,
            "woq.backends.ipex.missing": None,
            "woq.native.why_not": None,
            "woq.backends.triton.missing": None,
            "torch.cuda.is_available": True,
            "torch.cuda.get_device_capability": (9, 0),
        }.items():
            stack.enter_context(patch(probe, return_value=answer))
        yield


def pairs() -> list[tuple[Entry, str]]:
    """Every backend on every device it is for, in the order in which they are tried."""
    return [
        (entry, device) for device in DEVICES for entry in BACKENDS if device in (entry.devices or DEVICES)
    ]


def supported(name: str, device: str, spec: WeightSpec) -> str:
    """The dtypes of activations for which `name` takes such a layer."""
    backend = load(name)
    takes = [
        d for d, dtype in DTYPES.items() if backend.why_not(spec, Target(torch.device(device), dtype)) is None
    ]
    return " ".join(takes) or "-"


def matrix() -> str:
    """A table for each backend and device: layers by bits; widths that are the same share a column."""
    parts = []
    for entry, device in pairs():
        if entry.devices is None:  # the reference: takes everything
            continue
        columns = {
            bits: [supported(entry.name, device, replace(spec, bits=bits)) for spec in LAYERS.values()]
            for bits in BITS
        }
        shared: dict[tuple[str, ...], list[int]] = {}
        for bits, cells in columns.items():
            shared.setdefault(tuple(cells), []).append(bits)
        heads = [f"{', '.join(map(str, widths))} bit" for widths in shared.values()]
        named = ", only by name" if entry.by_name_only else ""
        rows = [[layer, *(cells[i] for cells in shared)] for i, layer in enumerate(LAYERS)]
        parts.append(f"### `{entry.name}` on {device}{named}\n\n" + table(["", *heads], rows))
    return "\n".join(parts)


def reasons() -> str:
    """Everything that `why_not` says of these layers at 3, 4 and 8 bits: each reason once."""
    said: dict[tuple[str, str], None] = {}
    for entry, device in pairs():
        for dtype in DTYPES.values():
            for spec in LAYERS.values():
                for bits in (3, 4, 8):
                    target = Target(torch.device(device), dtype)
                    reason = load(entry.name).why_not(replace(spec, bits=bits), target)
                    if reason is not None:
                        said[f"`{entry.name}` on {device}", reason] = None
    return table(["backend", "reason"], [list(pair) for pair in said])


def hardware() -> str:
    """Each backend and device: whether it has run on the real thing."""
    ran = {(entry["backend"], entry["device"]): entry for entry in json.loads(RAN.read_text())}
    rows = []
    for entry, device in pairs():
        told = ran.get((entry.name, device))
        run = (
            "**no**"
            if told is None
            else f"yes: {told['ran']}; {told['machine']}; {told['versions']}; {told['date']}"
        )
        rows.append([f"`{entry.name}`", device, run])
    return table(["backend", "device", "run on real hardware"], rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def generate(page: str) -> str:
    """`page` with its generated parts made anew."""
    with everything_there():
        made = {"hardware": hardware(), "matrix": matrix(), "reasons": reasons()}
    for name, text in made.items():
        before, begin, rest = page.partition(BEGIN.format(name))
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise ValueError(f"{PAGE} lacks {BEGIN.format(name)!r} or {END!r}")
        page = f"{before}{begin}\n{text}\n{end}{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(generate(PAGE.read_text()))
