"""From texts to rewarded rollouts: the grader's verdict, the reward's terms, DRPO's preference.

Judging is split over the ranks, and every rank gets every number. Knows no policy, no engine and no objective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nemo_disco.algorithms.sampling import Questions, grade
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.rewards import GradedResponse, Rewards
from nemo_disco.rewards.registry import Grader
from nemo_disco.runtime.errors import UserError

T = TypeVar("T")


def reward(
    rollouts: Rollouts,
    texts: Sequence[str],
    picked: Questions,
    *,
    grader: Grader,
    rewards: Rewards,
    threshold: float,
    max_response_length: int,
) -> Rollouts:
    """The rollouts with verdicts, rewards and preferences. A collective.

    Raises UserError, the same on every rank, for a user's function that raises or returns no finite number.
    """
    verdicts = grade(grader, texts, picked)
    graded = rollouts.with_rewards(verdicts, threshold)

    def judge(i: int) -> tuple[float, float]:
        question = picked.questions[i]
        response = GradedResponse(
            question=question.messages[-1].content,
            response=texts[i],
            answers=question.answers,
            verdict=verdicts[i],
            correct=bool(graded.correct[i]),
            length=int(rollouts.response_lengths[i]),
            max_response_length=max_response_length,
            truncated=bool(rollouts.truncated[i]),
            metadata=question.metadata,
        )
        return rewards.reward(response), rewards.preference(response)

    judged = torch.tensor(on_shares(len(texts), judge), dtype=torch.float64).reshape(-1, 2)
    return replace(graded, rewards=judged[:, 0], preferences=judged[:, 1])


def on_shares(count: int, judge: Callable[[int], T]) -> list[T]:
    """[judge(i) for i in range(count)], each rank doing its share. A UserError on one is raised on all."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mine: list[T] | UserError
    try:
        mine = [judge(i) for i in range(rank, count, size)]
    except UserError as error:
        mine = error
    shares: list[Any] = [None] * size
    dist.all_gather_object(shares, mine)
    for share in shares:
        if isinstance(share, UserError):
            raise share
    return [shares[i % size][i // size] for i in range(count)]
