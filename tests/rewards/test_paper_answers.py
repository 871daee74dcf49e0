"""Every gold answer of the papers' sets: equal to itself, in whatever spelling, and to nothing else.

The sets are not part of the project: these tests exist where NEMO_DISCO_PAPER_DATA or ../shared/data does.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from answer_forms import changed, respelled

from nemo_disco.rewards import MathGrader
from nemo_disco.rewards.math.fast_path import numeral
from nemo_disco.rewards.math.units import for_algebra

DATA = Path(os.environ.get("NEMO_DISCO_PAPER_DATA", Path(__file__).parents[3] / "shared" / "data"))
FILES = sorted(DATA.glob("deepscaler/t*/*.json"))
SHARE = 0.995


def answers(file: Path) -> list[str]:
    """The distinct gold answers of a set; questions without one are the data room's business."""
    golds: set[str] = set()
    for question in json.loads(file.read_text()):
        answer = question["answer"]
        golds.update(str(one) for one in (answer if isinstance(answer, list) else [answer]) if one is not None)
    return sorted(gold for gold in golds if gold.strip())


def graded(grader: MathGrader, given: list[str], golds: list[str]) -> list[str]:
    """The gold answers for which the given answer counts as correct."""
    rewards = grader.grade([rf"...</think> \boxed{{{answer}}}" for answer in given], golds)
    return [gold for gold, reward in zip(golds, rewards, strict=True) if reward == 1.0]


if FILES:

    @pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
    def test_each_gold_answer_is_itself(grader: MathGrader, file: Path) -> None:
        golds = answers(file)
        for spell in (str, respelled):
            correct = graded(grader, [spell(gold) for gold in golds], golds)
            assert len(correct) >= SHARE * len(golds), sorted(set(golds) - set(correct))

    @pytest.mark.slow
    @pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
    def test_each_gold_answer_is_itself_to_the_algebra_too(grader: MathGrader, file: Path) -> None:
        """Past the comparison of texts, which would hide what math-verify cannot parse."""
        golds = [gold for gold in answers(file) if numeral(for_algebra(gold)) is None]
        futures = [grader._pool.submit(for_algebra(gold), [for_algebra(gold)]) for gold in golds]
        wrong = [gold for gold, future in zip(golds, futures, strict=True) if future.result() != "correct"]
        assert len(wrong) <= 0.03 * len(answers(file)), wrong

    @pytest.mark.slow
    @pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
    def test_a_changed_answer_is_not_the_gold_answer(grader: MathGrader, file: Path) -> None:
        rng = random.Random(0)
        golds = answers(file)
        correct = graded(grader, [changed(gold, rng) for gold in golds], golds)
        # `2/3 \approx 0.67` is read as 2/3, whatever stands behind the sign.
        assert [gold for gold in correct if r"\approx" not in gold] == []
