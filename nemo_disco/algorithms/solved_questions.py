"""The questions that a run has asked so far, and those of them that it has answered right at least once. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_disco.data.rollouts import Rollouts


class SolvedQuestions:
    """Follows the training questions of a run. A group that dynamic sampling dropped is not seen."""

    def __init__(self) -> None:
        self._asked: set[int] = set()
        self._solved: set[int] = set()

    def update(self, rollouts: Rollouts) -> dict[str, float]:
        """Add a step's responses; returns the share of the questions asked so far that no response has solved."""
        self._asked |= set(rollouts.question_ids.tolist())
        self._solved |= set(rollouts.question_ids[rollouts.correct].tolist())
        return {"groups/never_solved": 1 - len(self._solved) / max(len(self._asked), 1)}

    def state_dict(self) -> dict[str, Any]:
        return {"solved": sorted(self._solved), "unsolved": sorted(self._asked - self._solved)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint; {} is one without any question."""
        self._solved = set(state.get("solved", ()))
        self._asked = self._solved | set(state.get("unsolved", ()))
