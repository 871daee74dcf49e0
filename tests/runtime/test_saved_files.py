"""The reader of saved files: damage is reported in one line, and no file makes it wait."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.saved_files import (
    FileError,
    check_directory,
    read_bytes,
    read_json,
    read_json_lines,
    read_text,
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"\0\0\0", "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a":' * 1000, "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b'{"b": 1}', "`a`: it should be a valid integer"),
    ],
)
def test_json_of_another_shape_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "f.json"
    file.write_bytes(content.replace(b'"b"', b'"a": null, "b"'))
    with pytest.raises(FileError, match=message) as error:
        read_json(file, dict[str, Any] if b"b" not in content else dict[str, int])
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value), "pickling changes the error"


def test_a_path_that_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    (tmp_path / "target").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("fifo", "directory", "link", "loop", "endless", "absent"):
        with pytest.raises(UserError, match=f"{name}: "):
            read_bytes(tmp_path / name)
    assert read_bytes(tmp_path / "link", links=True) == b"{}"
    with pytest.raises(FileError, match="device"):
        read_bytes(tmp_path / "endless", links=True)


@pytest.mark.parametrize("name", ["pipe", "additional_chat_templates/pipe.jinja"])
def test_a_pipe_in_a_directory_that_a_library_reads_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    check_directory(tmp_path)
    os.mkfifo(tmp_path / name)
    with pytest.raises(FileError, match=rf"{name}: a FIFO stands"):
        check_directory(tmp_path)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(FileError, match="at most"):
        read_bytes(tmp_path / "f")
    [line] = read_json_lines(tmp_path / "f", dict[str, Any])
    assert "longer than" in line.fault and len(line.raw) <= 100


def test_text_is_utf8_without_nul(tmp_path: Path) -> None:
    for content, message in ((b"a\0b", "NUL"), (b"a: \xe9", "not UTF-8 text: byte 0xe9 at 3")):
        (tmp_path / "f").write_bytes(content)
        with pytest.raises(FileError, match=message):
            read_text(tmp_path / "f")
