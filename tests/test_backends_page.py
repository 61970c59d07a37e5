"""docs/backends.md says what the backends say, and claims no run that is not recorded."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from woq.backends import BACKENDS
from woq.device import DEVICES

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_backends", DOCS / "generate_backends.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(generator: ModuleType) -> None:
    page = (DOCS / "backends.md").read_text()
    assert page == generator.generate(page), "run `python docs/generate_backends.py`"


def test_a_stale_page_is_seen(generator: ModuleType) -> None:
    page = (DOCS / "backends.md").read_text()
    assert generator.generate(page.replace("| `xpu` | xpu | **no** |", "| `xpu` | xpu | yes |")) == page
    with pytest.raises(ValueError, match="lacks"):
        generator.generate(page.replace("<!-- generated: matrix -->", ""))


def test_records_are_of_backends_that_exist() -> None:
    pairs = {(e.name, device) for e in BACKENDS for device in e.devices or DEVICES}
    records = json.loads((DOCS / "backends_ran.json").read_text())
    for record in records:
        assert record.keys() == {"backend", "device", "ran", "machine", "versions", "date"}
        assert (record["backend"], record["device"]) in pairs
        assert all(record.values())
    assert len({(r["backend"], r["device"]) for r in records}) == len(records)


def test_the_probes_are_left_as_they_were(generator: ModuleType) -> None:
    from woq.backends import ipex, xpu

    before = ipex.missing, xpu.has_kernel
    with generator.everything_there():
        assert ipex.missing() is None and xpu.has_kernel("aten::nothing")
    assert (ipex.missing, xpu.has_kernel) == before
