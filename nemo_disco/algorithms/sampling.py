"""From questions to graded responses: what training and evaluation share.

Touches an engine, a grader and a tokenizer through their contracts; no policy. Grading is split over the ranks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from nemo_disco.data.chat import decode
from nemo_disco.data.questions import Question
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.generation.engine import Engine, Finished, Response, Sampling
from nemo_disco.rewards.registry import Grader
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.signals import StoppedError

T = TypeVar("T")


@dataclass(frozen=True)
class Questions:
    """Questions with their prompts as token ids, under one name, and the tokenizer that made them."""

    name: str
    questions: Sequence[Question]
    prompts: Sequence[Sequence[int]]
    tokenizer: Any

    def __len__(self) -> int:
        return len(self.questions)

    def content(self) -> str:
        """A hash of what the questions say: texts, answers, weights and the other fields of their records."""
        digest = hashlib.sha256()
        for q in self.questions:
            said = [[list(m) for m in q.messages], q.answers, q.weight, q.metadata]
            digest.update(json.dumps(said, sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()

    def repeat(self, indices: Sequence[int], times: int) -> Questions:
        """The questions of `indices`, each `times` times in a row."""
        rows = [i for i in indices for _ in range(times)]
        return Questions(self.name, [self.questions[i] for i in rows], [self.prompts[i] for i in rows], self.tokenizer)


def sample_responses(
    engine: Engine, picked: Questions, seeds: Sequence[int], sampling: Sampling, finished: Finished | None = None
) -> tuple[Rollouts, list[str]]:
    """One response to each question of `picked`, packed and as text (without the token that ended it)."""
    return packed(picked, engine.generate(picked.prompts, seeds, sampling, finished))


def packed(picked: Questions, responses: Sequence[Response]) -> tuple[Rollouts, list[str]]:
    """What an engine answered to `picked`."""
    rollouts = Rollouts.from_lists(
        picked.prompts,
        [r.tokens for r in responses],
        [r.log_probs for r in responses],
        [q.id for q in picked.questions],
        [r.finish_reason == "length" for r in responses],
        [r.weight_version for r in responses],
    )
    return rollouts, [response_text(picked.tokenizer, r) for r in responses]


def response_text(tokenizer: Any, response: Response) -> str:
    """Without the token that ended it."""
    ended = response.finish_reason == "stop"
    return decode(tokenizer, response.tokens[:-1] if ended else response.tokens)


def grade(grader: Grader, texts: Sequence[str], picked: Questions) -> list[float]:
    """The reward of each response, graded a share a rank. A collective."""

    def share(mine: range) -> list[float]:
        return grader.grade([texts[i] for i in mine], [picked.questions[i].answers for i in mine])

    return on_shares(len(texts), share)


def on_shares(count: int, judge: Callable[[range], list[T]]) -> list[T]:
    """What `judge` says of each of `count` responses, each rank asked about its share. What is wrong with a user's
    code, or a StoppedError, is raised on every rank, even if one alone met it. A collective."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mine: list[T] | UserError | StoppedError
    try:
        mine = judge(range(rank, count, size))
    except (UserError, StoppedError) as error:
        mine = error
    shares: list[Any] = [mine] * size
    if size > 1:
        dist.all_gather_object(shares, mine)
    for share in shares:
        if isinstance(share, UserError | StoppedError):
            raise share
    return [shares[i % size][i // size] for i in range(count)]
