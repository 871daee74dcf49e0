"""What a method remembers of earlier steps about each question. The loop's state: plain JSON in its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from nemo_disco.data.rollouts import Rollouts


class ShortestCorrect:
    """Tokens of the shortest right answer so far, by question id (HAPO's h, arXiv 2505.11225)."""

    def __init__(self) -> None:
        self._lengths: dict[int, int] = {}

    def told(self, rollouts: Rollouts) -> Rollouts:
        """The rollouts with what was known before them; what they show is known from then on."""
        ids = rollouts.question_ids.tolist()
        known = torch.tensor([self._lengths.get(i, 0) for i in ids], dtype=torch.int64)
        for i, length, right in zip(ids, rollouts.response_lengths.tolist(), rollouts.correct.tolist(), strict=True):
            if right and length:
                self._lengths[i] = min(length, self._lengths.get(i, length))
        return replace(rollouts, shortest_correct=known)

    def state_dict(self) -> dict[str, int]:
        return {str(i): length for i, length in self._lengths.items()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._lengths = {int(i): length for i, length in state.items()}
