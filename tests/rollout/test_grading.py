"""Grading while others are sampled: every response graded once, overlapping, and a grader's error is the run's."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch.distributed as dist
from tiny_models import model_config

from nemo_disco.data.questions import Question
from nemo_disco.generation.engine import Response
from nemo_disco.policy import parallel
from nemo_disco.rollout.grading import EarlyGrades
from nemo_disco.rollout.prompts import PromptSet


class Tokenizer:
    def decode(self, tokens: list[int], **_: Any) -> str:
        return " ".join(map(str, tokens))


class Grader:
    """1 where the text is the answer."""

    def __init__(self) -> None:
        self.graded: list[str] = []
        self.began = threading.Event()

    def grade(self, texts: Any, answers: Any) -> list[float]:
        self.began.set()
        self.graded += texts
        if "13" in texts:
            raise ValueError("no thirteen")
        return [float(text in gold) for text, gold in zip(texts, answers, strict=True)]


@pytest.fixture
def picked(tmp_path: Any) -> PromptSet:
    if not dist.is_initialized():
        parallel.start(model_config(tmp_path))
    return PromptSet(
        "q", [Question(i, f"{i}?", (str(10 + i),), "s") for i in range(6)], [[i] for i in range(6)], Tokenizer()
    )


def response(*tokens: int) -> Response:
    return Response([*tokens], [0.0] * len(tokens), "length", 0)


def test_what_is_finished_is_graded_while_the_rest_is_sampled(picked: PromptSet) -> None:
    grader = Grader()
    early = EarlyGrades(grader, picked)  # type: ignore[arg-type]
    early.finished(4, response(14))
    assert grader.began.wait(10)  # nobody has collected yet
    early.finished(1, response(99))
    texts = ["10", "99", "0", "0", "14", "15"]

    def rest(left: list[str], questions: PromptSet) -> list[float]:
        assert left == ["10", "0", "0", "15"]  # what the engine did not hand over
        return [float(text in q.answers) for text, q in zip(left, questions.questions, strict=True)]

    assert early.collect(texts, rest) == [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    assert sorted(grader.graded) == ["14", "99"]


def test_a_graders_error_is_raised_where_the_grades_are_collected(picked: PromptSet) -> None:
    early = EarlyGrades(Grader(), picked)  # type: ignore[arg-type]
    early.finished(0, response(13))
    with pytest.raises(ValueError, match="no thirteen"):
        early.collect(["13"] * 6, lambda *_: [])
