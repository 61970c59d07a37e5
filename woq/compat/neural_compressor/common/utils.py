"""`neural_compressor.common.utils`: what example scripts take from it."""

from __future__ import annotations

import importlib
from typing import Any


class LazyImport:
    """A module that is imported when something of it is first asked for."""

    def __init__(self, module_name: str) -> None:
        self.module_name = module_name

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.module_name), name)
