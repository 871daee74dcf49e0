"""Ways in which a file is damaged, for property tests."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import strategies as st

JUNK = (b"", b"\0" * 50, b"\xff\xfe", b"[" * 5000, b"null\n", b'{"step": null}\n', b'{"step": 1e999}\n', b"a: *a\n")


def spoil(file: Path, data: st.DataObject) -> None:
    how = data.draw(st.sampled_from(["cut", "byte", "junk", "insert", "fifo", "directory", "zero", "gone"]))
    content = file.read_bytes()
    at = data.draw(st.integers(0, max(0, len(content) - 1)))
    file.unlink()
    if how == "fifo":
        os.mkfifo(file)
    elif how == "directory":
        file.mkdir()
    elif how == "zero":
        file.symlink_to("/dev/zero")
    elif how != "gone":
        junk = data.draw(st.sampled_from(JUNK))
        byte = bytes([data.draw(st.integers(0, 255))])
        changed = {"cut": b"", "byte": byte + content[at + 1 :], "insert": junk + content[at:], "junk": junk}[how]
        file.write_bytes(changed if how == "junk" else content[:at] + changed)
