"""Damage to a file, drawn at random for property tests."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

KINDS = ("cut", "byte", "junk", "insert", "fifo", "directory", "zero", "gone")
JUNK = (
    b"",
    b"\0" * 50,
    b"\xff\xfe",
    b"[" * 5000,
    b"null\n",
    b'{"step": null}\n',
    b'{"step": 1e999}\n',
    b"a: *a\n",
)
ODD = [
    None,
    True,
    -1,
    2**70,
    10**400,
    0.5,
    float("inf"),
    float("nan"),
    "",
    "a/../b",
    "\ud800",
    [],
    {},
    [[1], [2, 3]],
]
ODD_YAML = ("!!binary aGk=", "2024-01-01", "null", "[1]", "{a: 1}", "&a [*a]", ".nan", "${x}", "???", "1:30")


def damage_file(file: Path, data: st.DataObject) -> None:
    """Damage a file in a way that `data` draws; in a JSON or YAML file this may be a change of one value alone.

    The path may afterwards be missing, a FIFO, a directory or a link to /dev/zero.
    """
    content = file.read_bytes()
    values = ["value"] * (4 if file.suffix in (".json", ".jsonl", ".yaml") and content else 0)
    kind = data.draw(st.sampled_from([*KINDS, *values]))
    at = data.draw(st.integers(0, max(0, len(content) - 1)))
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    elif kind == "zero":
        file.symlink_to("/dev/zero")
    elif kind == "value":
        file.write_bytes(_with_odd_value(file.suffix, content, data))
    elif kind != "gone":
        junk = data.draw(st.sampled_from(JUNK))
        byte = bytes([data.draw(st.integers(0, 255))])
        tail = {"cut": b"", "byte": byte + content[at + 1 :], "insert": junk + content[at:], "junk": junk}[kind]
        file.write_bytes(tail if kind == "junk" else content[:at] + tail)


def _with_odd_value(suffix: str, content: bytes, data: st.DataObject) -> bytes:
    """The content of a JSON, JSONL or YAML file, with one value of a line (of the whole, for JSON) replaced."""
    lines = [content] if suffix == ".json" else content.splitlines()
    at = data.draw(st.integers(0, len(lines) - 1))
    if suffix == ".yaml":
        key = lines[at].partition(b": ")[0]
        lines[at] = key.rstrip(b":") + b": " + data.draw(st.sampled_from(ODD_YAML)).encode()
    else:
        value = json.loads(lines[at])
        container, key = data.draw(st.sampled_from(list(_keys(value))))
        container[key] = data.draw(st.sampled_from(ODD))
        lines[at] = json.dumps(value).encode()
    return b"\n".join(lines) + b"\n"


def _keys(value: Any) -> Any:
    """Every (container, key or index) in a JSON value, at any depth; only the first 3 items of each list."""
    keys = value if isinstance(value, dict) else range(min(3, len(value))) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from _keys(value[key])
