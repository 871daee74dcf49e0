"""A user's module is located without being imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from user_module import write_user_module

from nemo_disco.runtime.user_code import module_file


def test_a_modules_file_is_found_without_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = write_user_module(tmp_path / "my_located.py", "raise SystemExit", monkeypatch)
    inner = tmp_path / "my_package" / "inner.py"
    inner.parent.mkdir()
    for path in (inner, inner.with_name("__init__.py")):
        path.write_text("raise SystemExit")
    assert module_file("my_located:f") == str(module)
    assert module_file("my_package.inner:f") == str(inner)
    assert module_file("my_package:f") == str(inner.with_name("__init__.py"))
    for name in ("my_nothing:f", "my_located.inner:f", "my_package.nothing:f", "my_nothing.inner:f"):
        assert module_file(name) == ""
    assert not {"my_located", "my_package"} & sys.modules.keys()
