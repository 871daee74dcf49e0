"""The papers' table in the papers' order, majority votes and AES."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nemo_disco.evaluation.papers import (
    REPORTED,
    SETS,
    efficiency_table,
    papers_table,
    print_estimates,
    print_tables,
    read_reference,
)
from nemo_disco.evaluation.result import EvaluationResult, read_evaluation, write_evaluation
from nemo_disco.evaluation.statistics import accuracy_efficiency_score, maj_at_k
from nemo_disco.rewards.votes import assign_votes
from nemo_disco.runtime.errors import UserError

QWEN = "DeepSeek-R1-Distill-Qwen-1.5B"


def make_small_result(name: str, right: int, length: int = 100, step: int = 0) -> EvaluationResult:
    """A result of ten questions with two samples each; both are correct for `right` of the questions."""
    correct = np.arange(10)[:, None] < np.full((1, 2), right)
    return EvaluationResult(name, step, correct, np.full((10, 2), length), np.zeros((10, 2), bool))


def test_the_papers_sets_and_rows_are_in_the_papers_order() -> None:
    shuffled = [make_small_result(name, i) for i, name in enumerate(sorted(SETS))] + [make_small_result("mine", 9)]
    head, own_row, *paper_rows = papers_table(shuffled, QWEN).splitlines()
    at = [head.index(title) for title in [*SETS.values(), "mine", "Avg. of six"]]
    assert at == sorted(at)
    scores = {name: i / 10 for i, name in enumerate(sorted(SETS))}
    assert own_row.split() == ["this", "model", *(f"{scores[n]:.3f}" for n in SETS), "0.900", "0.250"]
    assert len(paper_rows) == 9 and paper_rows[-1].split()[0] == "DisCO" and paper_rows[-1].endswith("0.533")
    assert "2505.12366" in paper_rows[0]


def test_the_average_needs_all_six_sets_and_the_rows_a_model_of_the_papers() -> None:
    lines = papers_table([make_small_result("math", 5)], None).splitlines()
    assert len(lines) == 2 and lines[1].split() == ["this", "model", "0.500", "-"]
    assert all(len(row) == 8 for row in REPORTED.values())


def test_the_papers_table_is_printed_only_for_the_papers_sets(capsys: pytest.CaptureFixture[str]) -> None:
    print_tables([make_small_result("mine", 5)], {}, QWEN)
    assert capsys.readouterr().out == ""
    print_tables([make_small_result("math", 5)], {"math": make_small_result("math", 5)}, QWEN)
    assert "MATH 500" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("length", "accuracy", "expected"), [(50, 0.5, 0.5), (50, 0.6, 0.5), (50, 0.4, 0.5 - 10 * 0.2), (200, 0.5, -1.0)]
)
def test_aes_by_hand(length: float, accuracy: float, expected: float) -> None:
    assert accuracy_efficiency_score(length, accuracy, (100, 0.5)) == pytest.approx(expected)


def test_aes_against_a_reference_run(tmp_path: Path) -> None:
    for step, length in ((0, 400), (10, 200)):
        write_evaluation(tmp_path / "evaluation", make_small_result("math", 5, length, step))
    reference = read_reference(tmp_path)
    lines = efficiency_table([make_small_result("math", 5), make_small_result("amc", 5)], reference).splitlines()
    assert len(lines) == 3  # only the sets that both have
    assert lines[1].split()[-5:] == ["100.0", "200.0", "0.500", "0.500", "0.500"]  # against the last step
    assert lines[2].split() == ["mean", "0.500"]
    assert "no score" in efficiency_table([make_small_result("math", 5)], {"math": make_small_result("math", 0)})
    with pytest.raises(UserError, match="no evaluation there"):
        read_reference(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="gives no score"):
        accuracy_efficiency_score(1, 1, (0, 1))


def test_majority_votes_by_hand() -> None:
    correct = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]], bool)
    ballots = [[0, 0, 1, 2], [0, 1, 1, 2], [-1, -1, -1, 0], [-1, -1, -1, -1], [0, 0, 1, 1]]
    # A correct majority; a wrong one; samples without an answer, which do not vote; no votes; a tie.
    assert maj_at_k(correct, ballots).tolist() == [1.0, 0.0, 1.0, 0.0, 0.5]
    with pytest.raises(ValueError, match="votes for"):
        maj_at_k(correct, [[0]])


def test_equal_answers_in_different_spelling_vote_together() -> None:
    texts = [
        r"\boxed{0.5}",
        r"</think> \boxed{\frac12}",
        r"\boxed{1/2}",
        r"\boxed{2}",
        "It is\n0.50",
        "",
        r"\boxed{x }",
    ]
    assert assign_votes(texts) == [0, 0, 0, 1, 0, -1, 2]


def test_votes_are_saved_and_files_without_them_are_read(
    make_result: Callable[..., EvaluationResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = make_small_result("math", 5)
    with_votes = EvaluationResult(plain.name, 1, plain.correct, plain.lengths, plain.truncated, None, plain.correct * 1)
    loaded = read_evaluation(write_evaluation(tmp_path, with_votes))
    assert loaded.votes is not None and (loaded.votes == plain.correct).all()
    assert loaded.metrics()["eval/math/maj@2"] == 0.5
    old = make_result().to_json()
    del old["votes"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert read_evaluation(tmp_path / "old.json").votes is None
    print_estimates(make_result())
    assert re.findall(r"pass@\d+", capsys.readouterr().out) == ["pass@1", "pass@8", "pass@2", "pass@4"]
