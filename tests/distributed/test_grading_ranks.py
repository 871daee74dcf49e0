"""An error in a user's reward during sampling, on the one rank that drives the engine, is raised on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch.distributed as dist

from nemo_disco.data.questions import Question
from nemo_disco.generation.engine import Response
from nemo_disco.rollout.grading import EarlyGrading
from nemo_disco.rollout.prompts import PromptSet
from nemo_disco.runtime.errors import UserError


class WordTokenizer:
    def decode(self, tokens: list[int], **_: Any) -> str:
        return " ".join(map(str, tokens))


class FailingGrader:
    def grade(self, texts: Any, answers: Any) -> list[float]:
        raise UserError(f"my_rewards.py line 3: {texts[0]} is none of {len(answers)}")


RESPONSE = Response(np.array([7]), np.zeros(1, np.float32), "length", 0)


def collect_error() -> str:
    """Message of the error that collecting the verdicts raises on this rank; empty if there is none."""
    prompts = PromptSet("q", [Question(0, "0?", ("1",), "s")] * 2, [[0]] * 2, WordTokenizer())
    early = EarlyGrading(FailingGrader(), prompts)  # type: ignore[arg-type]
    if dist.get_rank() == 0:
        early.finished(1, RESPONSE)
    try:
        early.collect([RESPONSE] * 2)
    except UserError as error:
        return str(error)
    return ""


def test_an_error_of_early_grading_is_raised_on_every_rank(run_on_ranks: Callable[..., list[Any]]) -> None:
    assert run_on_ranks(2, collect_error) == ["my_rewards.py line 3: 7 is none of 1"] * 2
