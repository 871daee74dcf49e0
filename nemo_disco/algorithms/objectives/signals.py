"""Signals: per-response numbers that an objective reads beside the rewards, computed once for each step's rollouts.

A signal is declared by the objective that reads it (Objective.signals) and travels as a column of that name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor


class RewardedResponses(Protocol):
    """N responses of one step, as a signal sees them: [N] each (data.rollouts.Rollouts)."""

    @property
    def question_ids(self) -> Tensor: ...
    @property
    def response_lengths(self) -> Tensor: ...
    @property
    def rewards(self) -> Tensor: ...
    @property
    def correct(self) -> Tensor: ...
    @property
    def truncated(self) -> Tensor: ...
    @property
    def weight_versions(self) -> Tensor: ...
    @property
    def max_response_length(self) -> int: ...


class Signal(ABC):
    """Computes one column of a step's rollouts, and may remember earlier steps."""

    name: ClassVar[str]

    @abstractmethod
    def annotate(self, responses: RewardedResponses) -> Tensor:
        """[N] the column, from this step's responses and the memory of earlier ones; then updates the memory."""

    def state_dict(self) -> dict[str, Any]:
        """The memory, as plain JSON; it is saved in the run's checkpoints."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most signals remember nothing
        """Restore the memory of a checkpoint; {} is an empty one."""


class CompletedSteps(Signal):
    """Training steps that had been done when the weights that sampled the response were made.

    It is their version, so it remembers nothing: a step of several sampling rounds counts once, and a resumed run goes
    on where it was.
    """

    name: ClassVar[str] = "completed_steps"

    def annotate(self, responses: RewardedResponses) -> Tensor:
        return responses.weight_versions
