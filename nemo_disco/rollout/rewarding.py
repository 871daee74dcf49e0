"""Rewards of graded responses: the weighted sum of the reward terms, and the columns that an objective declares.

The work is split over the ranks, and every rank gets every number. Knows no policy and no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from nemo_disco.data.rollouts import Rollouts
from nemo_disco.rewards import GradedResponse, Rewards
from nemo_disco.rollout.prompts import PromptSet
from nemo_disco.runtime.collectives import on_shares


def reward_rollouts(
    rollouts: Rollouts,
    texts: Sequence[str],
    prompts: PromptSet,
    *,
    grades: Sequence[float],
    rewards: Rewards,
    threshold: float,
) -> Rollouts:
    """The rollouts with verdicts, rewards and the columns of `rewards`. A collective.

    texts, prompts, grades: one a response; a response is correct when its grade is above the threshold.
    Raises UserError, the same on every rank, for a user's function that raises or returns no finite number.
    """
    graded = rollouts.with_rewards(grades, threshold)

    def graded_response(i: int) -> GradedResponse:
        question = prompts.questions[i]
        return GradedResponse(
            question=question.messages[-1].content,
            response=texts[i],
            answers=question.answers,
            verdict=grades[i],
            correct=bool(graded.correct[i]),
            length=int(rollouts.response_lengths[i]),
            max_response_length=rollouts.max_response_length,
            truncated=bool(rollouts.truncated[i]),
            metadata=question.metadata,
        )

    numbers = on_shares(len(texts), lambda share: rewards.compute([graded_response(i) for i in share]))
    table = torch.tensor(numbers, dtype=torch.float64).reshape(len(texts), 1 + len(rewards.columns))
    columns = {name: table[:, 1 + i].clone() for i, name in enumerate(rewards.columns)}
    return replace(graded, rewards=table[:, 0].clone()).with_columns(columns)
