"""Modules of ours are imported right after those they register with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from woq import hooks


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`theirs_x` and `ours_x`, importable; the finder as `install` leaves it."""
    (tmp_path / "theirs_x.py").write_text("value = 1\n")
    (tmp_path / "ours_x.py").write_text("import theirs_x\ntheirs_x.value += 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(hooks, "AFTER", {"theirs_x": "ours_x"})
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, hooks._Finder)])
    yield tmp_path  # type: ignore[misc]
    for name in ("theirs_x", "ours_x"):
        sys.modules.pop(name, None)


def test_before(pair: Path) -> None:
    hooks.install()
    hooks.install()
    assert sum(isinstance(f, hooks._Finder) for f in sys.meta_path) == 1
    assert "theirs_x" not in sys.modules
    import theirs_x  # type: ignore[import-not-found]

    assert theirs_x.value == 2
    assert type(theirs_x.__loader__).__name__ == type(theirs_x.__spec__.loader).__name__ == "SourceFileLoader"


def test_after(pair: Path) -> None:
    import theirs_x

    hooks.install()
    assert theirs_x.value == 2


def test_a_library_that_changed_stays_usable(pair: Path) -> None:
    (pair / "ours_x.py").write_text("from theirs_x import no_such_name\n")
    hooks.install()
    with pytest.warns(
        RuntimeWarning, match="could not register with theirs_x: cannot import name 'no_such_name'"
    ):
        import theirs_x

    assert theirs_x.value == 1
