"""Being known to transformers and PEFT without importing them: our modules are imported right after theirs.

`import woq` must cost nothing, and yet plain `transformers.AutoModelForCausalLM.from_pretrained(folder)` has to find our
quantizer afterwards. So one finder is put on `sys.meta_path` that knows two names and passes on every other; when one
of them has been imported (by whoever needs it), the module of ours that registers with it is imported too. What is
loaded already when woq comes is registered with at once.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AFTER = {
    "transformers.quantizers.auto": "woq.compat.quantizer",
    "peft.tuners.lora.model": "woq.compat.lora",
}
"""Their module -> ours that registers with it."""


def install() -> None:
    """Register with what is loaded, and see to the rest when it is."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for theirs in AFTER:
        if theirs in sys.modules:
            _register(theirs)


def _register(theirs: str) -> None:
    """A library that changed under us must stay usable without us: say so, and leave it alone."""
    try:
        importlib.import_module(AFTER[theirs])
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        warnings.warn(f"woq could not register with {theirs}: {error}", RuntimeWarning, stacklevel=2)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in AFTER:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(Loader):
    """The real loader, and our module after it."""

    def __init__(self, real: Loader) -> None:
        self.real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.real
        if module.__spec__ is not None:
            module.__spec__.loader = self.real
        self.real.exec_module(module)
        _register(module.__name__)
