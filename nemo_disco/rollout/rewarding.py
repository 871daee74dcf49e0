"""From texts to rewarded rollouts: the grader's verdict, the reward's terms, DRPO's preference.

Judging is split over the ranks, and every rank gets every number. Knows no policy, no engine and no objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from nemo_disco.data.rollouts import Rollouts
from nemo_disco.rewards import GradedResponse, Rewards
from nemo_disco.rollout.prompts import PromptSet
from nemo_disco.runtime.collectives import on_shares


def reward(
    rollouts: Rollouts,
    texts: Sequence[str],
    picked: PromptSet,
    *,
    verdicts: Sequence[float],
    rewards: Rewards,
    threshold: float,
    max_response_length: int,
) -> Rollouts:
    """The rollouts with their verdicts (the grader's, one a response), rewards and preferences. A collective.

    Raises UserError, the same on every rank, for a user's function that raises or returns no finite number.
    """
    graded = rollouts.with_rewards(verdicts, threshold)

    def seen(i: int) -> GradedResponse:
        question = picked.questions[i]
        return GradedResponse(
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

    judged = on_shares(len(texts), lambda mine: rewards.judge([seen(i) for i in mine]))
    terms = torch.tensor(judged, dtype=torch.float64).reshape(-1, 2)
    return replace(graded, rewards=terms[:, 0].clone(), preferences=terms[:, 1].clone())
