"""A module of a user, in the directory in which the program runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


def write_user_module(path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the module's source to `path` and change to its directory. Returns the path.

    The entry "" is taken off sys.path, so that only the package's own lookup finds the working directory. An earlier
    import of the module is forgotten.
    """
    path.write_text(source)
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.delitem(sys.modules, path.stem, raising=False)
    return path
