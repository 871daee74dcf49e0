"""Each gold answer of the papers' sets equals itself in another spelling, and does not equal a copy with a wrong digit.

The sets are not part of the project: the tests exist only if NEMO_DISCO_PAPER_DATA or ../shared/data holds them.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from answer_forms import change_digit, respell

from nemo_disco.rewards import MathGrader
from nemo_disco.rewards.math.fast_path import parse_numeral
from nemo_disco.rewards.math.units import strip_unit

DATA = Path(os.environ.get("NEMO_DISCO_PAPER_DATA", Path(__file__).parents[4] / "shared" / "data"))
FILES = sorted(DATA.glob("deepscaler/t*/*.json"))
SHARE = 0.995


def answers(file: Path) -> list[str]:
    """The distinct gold answers of a set; questions without one are left out (nemo_disco.data reports them)."""
    golds: set[str] = set()
    for question in json.loads(file.read_text()):
        answer = question["answer"]
        golds.update(str(a) for a in (answer if isinstance(answer, list) else [answer]) if a is not None)
    return sorted(gold for gold in golds if gold.strip())


def select_equal(grader: MathGrader, answers: list[str], golds: list[str]) -> list[str]:
    """The gold answers for which the answer at the same index is graded as right."""
    rewards = grader.grade([rf"...</think> \boxed{{{answer}}}" for answer in answers], golds)
    return [gold for gold, reward in zip(golds, rewards, strict=True) if reward == 1.0]


if FILES:

    @pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
    def test_each_gold_answer_equals_itself(grader: MathGrader, file: Path) -> None:
        golds = answers(file)
        for spell in (str, respell):
            correct = select_equal(grader, [spell(gold) for gold in golds], golds)
            assert len(correct) >= SHARE * len(golds), sorted(set(golds) - set(correct))

    @pytest.mark.slow
    @pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
    def test_each_gold_answer_equals_itself_in_algebra(grader: MathGrader, file: Path) -> None:
        """The answers go straight to algebra: a comparison of texts would hide those that algebra cannot parse."""
        golds = [gold for gold in answers(file) if parse_numeral(strip_unit(gold)) is None]
        futures = [grader._pool.submit(strip_unit(gold), [strip_unit(gold)]) for gold in golds]
        wrong = [gold for gold, future in zip(golds, futures, strict=True) if future.result() != "correct"]
        assert len(wrong) <= 0.03 * len(answers(file)), wrong

    @pytest.mark.slow
    @pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
    def test_a_changed_answer_does_not_equal_the_gold_answer(grader: MathGrader, file: Path) -> None:
        rng = random.Random(0)
        golds = answers(file)
        correct = select_equal(grader, [change_digit(gold, rng) for gold in golds], golds)
        # `2/3 \approx 0.67` is read as 2/3, whatever number follows the sign.
        assert [gold for gold in correct if r"\approx" not in gold] == []
