"""A module of a user's, beside whom the program runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


def beside_us(path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the module and work in its directory, from which alone it can be imported, anew."""
    path.write_text(source)
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.delitem(sys.modules, path.stem, raising=False)
    return path
