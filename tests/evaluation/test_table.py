"""An evaluation's file, its metrics, and its comparison with another one."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from nemo_disco.evaluation.result import EvaluationResult, read_evaluation, read_evaluations, write_evaluation
from nemo_disco.evaluation.table import compare, rich_table, setup_differences
from nemo_disco.runtime.errors import UserError

Make = Callable[..., EvaluationResult]


def test_a_written_result_is_read_back(tmp_path: Path, make_result: Make) -> None:
    result = make_result(step=40, name="math/500 test")
    path = write_evaluation(tmp_path, result)
    assert path.name == "math_500_test.step_40.json"
    loaded = read_evaluation(path)
    assert (loaded.name, loaded.step) == ("math/500 test", 40)
    for name in ("correct", "lengths", "truncated", "greedy_correct"):
        expected, actual = getattr(result, name), getattr(loaded, name)
        assert actual.dtype == expected.dtype and np.array_equal(actual, expected)
    summary = json.loads(path.read_text())["summary"]
    assert summary["pass@1"][0] == pytest.approx(result.correct.mean())
    assert summary["pass@1"][1] < summary["pass@1"][0] < summary["pass@1"][2]


def test_a_result_may_lack_greedy_verdicts(tmp_path: Path, make_result: Make) -> None:
    result = replace(make_result(), greedy_correct=None)
    loaded = read_evaluation(write_evaluation(tmp_path, result))
    assert loaded.greedy_correct is None
    assert "eval/arithmetic/greedy" not in loaded.metrics()


def test_a_runs_evaluations_are_sorted_by_set_and_step(tmp_path: Path, make_result: Make) -> None:
    for name, step in [("b", 10), ("a", 100), ("a", 9)]:
        write_evaluation(tmp_path, make_result(step=step, name=name))
    assert [(r.name, r.step) for r in read_evaluations(tmp_path)] == [("a", 9), ("a", 100), ("b", 10)]
    assert read_evaluations(tmp_path / "nowhere") == []


@pytest.mark.parametrize("text", ["", "[]", '{"name": "x"}', '{"name": "x", "step": 0, "correct": [[1], [1, 0]]}'])
def test_a_file_that_is_not_an_evaluation_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"odd\.json: (not|damaged)"):
        read_evaluation(path)


def test_shapes_that_disagree_are_refused(make_result: Make) -> None:
    result = make_result(questions=8)
    with pytest.raises(ValueError, match="one shape"):
        replace(result, lengths=result.lengths[:4])
    with pytest.raises(ValueError, match="8 questions"):
        replace(result, greedy_correct=np.ones(4, dtype=bool))


def test_metrics_have_the_names_of_the_public_contract(make_result: Make) -> None:
    result = make_result()
    metrics = result.metrics()
    assert metrics["eval/arithmetic/pass@1"] == pytest.approx(result.correct.mean())
    assert metrics["eval/arithmetic/pass@8"] == pytest.approx(result.correct.any(axis=1).mean())
    assert metrics["eval/arithmetic/length"] == pytest.approx(result.lengths.mean())
    assert all(type(value) is float for value in metrics.values())


def test_the_table_has_a_row_for_each_statistic(make_result: Make) -> None:
    before, after = make_result(0.3), make_result(0.9, step=50)
    rows = compare(before, after)
    assert [row.metric for row in rows] == [
        "Pass@1 (avg@8)",
        "greedy accuracy",
        "pass@8",
        "response length (tokens)",
        "truncated share",
    ]
    first = rows[0]
    assert first.before is not None and first.after is not None and first.change is not None
    assert first.change.value == pytest.approx(after.correct.mean() - before.correct.mean())
    assert first.change.low > 0
    assert first.before.value == pytest.approx(before.correct.mean())


def test_a_paired_change_is_narrower_than_the_two_intervals(make_result: Make) -> None:
    before = make_result(0.5, questions=200)
    better = before.correct.copy()
    better[:20, 0] = True
    row = compare(before, replace(before, correct=better))[0]
    assert row.before is not None and row.change is not None
    assert row.change.high - row.change.low < 0.2 * (row.before.high - row.before.low)


def test_different_questions_are_not_paired(make_result: Make) -> None:
    rows = compare(make_result(questions=64), make_result(questions=32))
    assert all(row.change is None for row in rows)
    old, new, new_again = (replace(make_result(), identity={"questions": hash}) for hash in ("a", "b", "b"))
    assert all(row.change is None for row in compare(old, new)), "as many questions, but other ones"
    assert all(row.change is not None for row in compare(new, new_again) if row.before)
    with pytest.raises(ValueError, match="cannot compare"):
        compare(make_result(name="a"), make_result(name="b"))


def test_the_table_shows_every_cell(make_result: Make) -> None:
    before = replace(make_result(0.3), greedy_correct=None)
    rows = compare(before, make_result(0.9, step=50))
    out = io.StringIO()
    Console(file=out, width=200).print(rich_table(rows, "arithmetic"))
    assert all(cell in out.getvalue() for row in rows for cell in row.cells())
    assert "before [95% CI]" in out.getvalue()


def test_differences_in_setup_are_named(make_result: Make) -> None:
    identity = {"step": 0, "precision": "32-true", "engine": {"name": "megatron", "tp": 1}, "verifier_code": "a" * 64}
    other_identity = identity | {"step": 9, "weights": [], "precision": "bf16", "engine": {"name": "vllm", "tp": 1}}
    before, after = make_result(), make_result(step=9)
    assert setup_differences(before, after) == "", "there are no identities to compare"
    assert setup_differences(replace(before, identity=identity), replace(after, identity=identity | {"step": 9})) == ""
    line = setup_differences(
        replace(before, identity=identity), replace(after, identity=other_identity | {"verifier_code": "b" * 64})
    )
    assert 'precision ("32-true", then "bf16")' in line and 'engine.name ("megatron", then "vllm")' in line
    assert "verifier_code" in line and "engine.tp" not in line and "step" not in line and "\n" not in line
