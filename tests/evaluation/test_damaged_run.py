"""However a run's files are damaged, its report is a page, or the command ends with an error of one line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import damage_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from in_process import run_in_process


def test_the_report_of_a_damaged_run_is_a_page_or_one_line(make_run: Callable[..., Path], tmp_path: Path) -> None:
    original = make_run(steps=2, questions=1, samples=2, tokens=True)
    page = tmp_path / "page.html"
    names = sorted(str(path.relative_to(original)) for path in original.rglob("*") if path.is_file())

    @settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def damage(data: st.DataObject) -> None:
        run = tmp_path / "damaged"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(original, run)
        for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)):
            damage_file(run / name, data)
        if not run_in_process(["report", str(run), "--out", str(page)]):
            script = re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)
            # JSON in a browser has no NaN.
            assert script is not None and json.loads(script[1], parse_constant=pytest.fail)
            page.unlink()

    damage()


def test_values_that_json_cannot_hold_are_left_out(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(steps=1, questions=1, samples=2, tokens=True)
    (run / "config.yaml").write_text("seed: !!binary aGk=\n")
    (file,) = (run / "rollouts").iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0] |= {"question_id": float("nan"), "reward": float("inf"), "weight": 10**400}
    rows[1] |= {"question_id": [float("nan")], "log_ratio": float("nan")}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_in_process(["report", str(run), "--out", str(tmp_path / "page.html")]) == ""
