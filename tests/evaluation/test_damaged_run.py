"""However a run's files are damaged, its report is a page or one line."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

from damage import spoil
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_disco.evaluation.report import write_report
from nemo_disco.runtime.errors import UserError


def test_its_report_is_a_page_or_one_line(make_run: Callable[..., Path], tmp_path: Path) -> None:
    sound = make_run(steps=2, questions=1, samples=2, tokens=True)
    names = sorted(str(path.relative_to(sound)) for path in sound.rglob("*") if path.is_file())

    @settings(max_examples=40, derandomize=True, deadline=10_000, suppress_health_check=list(HealthCheck))
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
