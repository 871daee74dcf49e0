"""Rewards of graded responses: the weighted sum of the reward terms, and the columns that an objective declares.

Knows no policy and no engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from nemo_disco.data.rollouts import Rollouts
from nemo_disco.rewards import GradedResponse, Rewards
from nemo_disco.rollout.prompts import PromptSet
from nemo_disco.runtime.collectives import on_shares
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.user_code import call_guarded, definition_place, is_user_class, user_methods


class Signal(Protocol):
    """A further column of the rollouts, which an objective declares (algorithms/objectives/signals.py)."""

    name: ClassVar[str]

    def annotate(self, responses: Rollouts, /) -> Tensor: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any], /) -> None: ...


def reward_rollouts(
    rollouts: Rollouts,
    texts: Sequence[str],
    prompts: PromptSet,
    grades: Sequence[float],
    rewards: Rewards,
    threshold: float,
) -> Rollouts:
    """The rollouts with verdicts, rewards and the columns of `rewards`. A collective: each rank computes a share.

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


def compute_column(signal: Signal, rollouts: Rollouts) -> Tensor:
    """The signal's column. Raises UserError, with file and line, if a user wrote the signal and it fails."""
    if not is_user_class(kind := type(signal)):
        return signal.annotate(rollouts)
    column: Any = call_guarded(f"signal={signal.name}", user_methods(kind), lambda: signal.annotate(rollouts))
    if not (isinstance(column, Tensor) and column.shape == (len(rollouts),) and bool(column.isfinite().all())):
        raise UserError(
            f"signal={signal.name}: {definition_place(kind.annotate)} must return a finite tensor of "
            f"{len(rollouts)} numbers, one per response; it returned {column}"
        )
    return column
