"""Fixtures for all tests: shared data where it is there, tiny random models, and skips by what the machine can do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.tiny_models import TINY_ARCHITECTURES

SHARED = Path(__file__).resolve().parents[2] / "shared"  # beside the repository; not part of it
CAPABILITIES = {
    "gpu": (torch.cuda.is_available, "no NVIDIA GPU that torch can use"),
    "xpu": (torch.xpu.is_available, "no Intel XPU that torch can use"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say why."""
    missing = {mark: why for mark, (available, why) in CAPABILITIES.items() if not available()}
    for item in items:
        for mark in missing.keys() & item.keywords.keys():
            item.add_marker(pytest.mark.skip(reason=missing[mark]))


def shared(relative: str) -> Path:
    """A path in the shared data; skips the test where it is absent."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"shared data is not beside the repository: {relative}")
    return path


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of shared models, texts and designs."""
    return shared("data").parent


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """Llama with 260 thousand parameters, hidden 64, vocabulary 512, float32, tokenizer beside it."""
    return shared("data/models/stories260K")


@pytest.fixture(scope="session")
def stories15m() -> Path:
    """Llama with 15 million parameters, hidden 288, vocabulary 32000, float16, tokenizer beside it."""
    return shared("data/models/stories15M")


@pytest.fixture
def tiny_model() -> Callable[[str], nn.Module]:
    """`tiny_model(arch)`: a fresh random model of an architecture in TINY_ARCHITECTURES, always the same weights."""
    return lambda arch: TINY_ARCHITECTURES[arch]()


@pytest.fixture
def rng() -> torch.Generator:
    """A seeded generator; the global one is seeded too, for code that takes none."""
    torch.manual_seed(0)
    return torch.Generator().manual_seed(0)
