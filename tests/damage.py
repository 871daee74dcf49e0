"""Ways in which a file is damaged, for property tests."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

HOW = ("cut", "byte", "junk", "insert", "fifo", "directory", "zero", "gone")
JUNK = (b"", b"\0" * 50, b"\xff\xfe", b"[" * 5000, b"null\n", b'{"step": null}\n', b'{"step": 1e999}\n', b"a: *a\n")
ODD = [None, True, -1, 2**70, 10**400, 0.5, float("inf"), float("nan"), "", "a/../b", "\ud800", [], {}, [[1], [2, 3]]]
ODD_YAML = ("!!binary aGk=", "2024-01-01", "null", "[1]", "{a: 1}", "&a [*a]", ".nan", "${x}", "???", "1:30")


def spoil(file: Path, data: st.DataObject) -> None:
    """Damage a file of any kind; of JSON and YAML sometimes one value alone."""
    content = file.read_bytes()
    values = ["value"] * (4 if file.suffix in (".json", ".jsonl", ".yaml") and content else 0)
    how = data.draw(st.sampled_from([*HOW, *values]))
    at = data.draw(st.integers(0, max(0, len(content) - 1)))
    file.unlink()
    if how == "fifo":
        os.mkfifo(file)
    elif how == "directory":
        file.mkdir()
    elif how == "zero":
        file.symlink_to("/dev/zero")
    elif how == "value":
        file.write_bytes(_with_odd_value(file.suffix, content, data))
    elif how != "gone":
        junk = data.draw(st.sampled_from(JUNK))
        byte = bytes([data.draw(st.integers(0, 255))])
        changed = {"cut": b"", "byte": byte + content[at + 1 :], "insert": junk + content[at:], "junk": junk}[how]
        file.write_bytes(changed if how == "junk" else content[:at] + changed)


def _with_odd_value(suffix: str, content: bytes, data: st.DataObject) -> bytes:
    lines = [content] if suffix == ".json" else content.splitlines()
    at = data.draw(st.integers(0, len(lines) - 1))
    if suffix == ".yaml":
        key = lines[at].partition(b": ")[0]
        lines[at] = key.rstrip(b":") + b": " + data.draw(st.sampled_from(ODD_YAML)).encode()
    else:
        value = json.loads(lines[at])
        place, key = data.draw(st.sampled_from(list(_places(value))))
        place[key] = data.draw(st.sampled_from(ODD))
        lines[at] = json.dumps(value).encode()
    return b"\n".join(lines) + b"\n"


def _places(value: Any) -> Any:
    """Every (container, key) of a JSON value, of long lists the first items."""
    keys = value if isinstance(value, dict) else range(min(3, len(value))) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from _places(value[key])
