"""However a run's files are damaged, its report is a page or one line."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_disco.evaluation.report import write_report
from nemo_disco.runtime.errors import UserError

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


def test_its_report_is_a_page_or_one_line(make_run: Callable[..., Path], tmp_path: Path) -> None:
    sound = make_run(steps=2, questions=1, samples=2, tokens=True)
    names = sorted(str(path.relative_to(sound)) for path in sound.rglob("*") if path.is_file())

    @settings(max_examples=40, deadline=10_000, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def damage(data: st.DataObject) -> None:
        run = tmp_path / "damaged"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(sound, run)
        for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)):
            spoil(run / name, data)
        with contextlib.suppress(UserError):
            assert write_report([run], tmp_path / "page.html").exists()

    damage()
