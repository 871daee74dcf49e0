"""Grading while other responses are sampled: each response is graded once, and a grader's error ends the step."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from tiny_models import model_config

from nemo_disco.data.questions import Question
from nemo_disco.generation.engine import Response
from nemo_disco.policy import parallel
from nemo_disco.rollout.grading import EarlyGrading
from nemo_disco.rollout.prompts import PromptSet


class Tokenizer:
    """Decodes each token as its number."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return " ".join(map(str, tokens))


class Grader:
    """Gives 1 to a text that is one of the answers, 0 to others; raises an error for "13"."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.started = threading.Event()

    def grade(self, texts: Any, answers: Any) -> list[float]:
        self.started.set()
        self.texts += texts
        if "13" in texts:
            raise ValueError("no thirteen")
        return [float(text in gold) for text, gold in zip(texts, answers, strict=True)]


@pytest.fixture
def prompts(tmp_path: Any) -> PromptSet:
    if not dist.is_initialized():
        parallel.start(model_config(tmp_path))
    return PromptSet(
        "q", [Question(i, f"{i}?", (str(10 + i),), "s") for i in range(6)], [[i] for i in range(6)], Tokenizer()
    )


def response(*tokens: int) -> Response:
    return Response(np.array(tokens), np.zeros(len(tokens), np.float32), "length", 0)


def test_finished_responses_are_graded_while_the_rest_is_sampled(prompts: PromptSet) -> None:
    grader = Grader()
    early = EarlyGrading(grader, prompts)  # type: ignore[arg-type]
    early.finished(4, response(14))
    assert grader.started.wait(10)  # before `collect`
    early.finished(1, response(99))
    responses = [response(10), response(99), response(0), response(0), response(14), response(15)]
    assert early.collect(responses) == [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    assert list(early.texts) == ["10", "99", "0", "0", "14", "15"]
    assert sorted(grader.texts[:2]) == ["14", "99"]
    assert grader.texts[2:] == ["10", "0", "0", "15"]  # those that were not passed to `finished`


def test_a_response_is_decoded_once(prompts: PromptSet, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(Tokenizer, "decode", lambda _, tokens, **__: calls.append(list(tokens)) or str(tokens[0]))
    early = EarlyGrading(Grader(), prompts)  # type: ignore[arg-type]
    early.finished(2, response(22))
    early.collect([response(20 + i) for i in range(6)])
    texts = early.texts.join([early.texts.select([2, 0]), early.texts.select([5])])
    assert list(texts) == ["22", "20", "25"]
    assert sorted(calls) == [[20 + i] for i in range(6)]


def test_a_graders_error_is_raised_where_the_grades_are_collected(prompts: PromptSet) -> None:
    early = EarlyGrading(Grader(), prompts)  # type: ignore[arg-type]
    early.finished(0, response(13))
    with pytest.raises(ValueError, match="no thirteen"):
        early.collect([response(13)] * 6)
