"""Per-token values of the responses that are saved to read: the objective's weight, and the log-ratio.

The trainer fills them mini-batch by mini-batch, and the journal writes them; decides nothing.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nemo_disco.algorithms.step import MiniBatchResult
from nemo_disco.data.rollouts import Rollouts


@dataclass(frozen=True)
class ResponseValues:
    """Values of one response's tokens, one each.

    weights: - T d loss / d log-prob, T the mini-batch's tokens: above 0 a token becomes likelier, and the size does not
    depend on T. log_ratios: log policy - log old policy, as the objective saw it (0 in a step's first mini-batch).
    """

    weights: NDArray[np.float64]
    log_ratios: NDArray[np.float64]


@dataclass
class TokenValues:
    """rows: the step's responses to save. by_response: values of those that were in an applied mini-batch."""

    rows: Container[int]
    by_response: dict[int, ResponseValues] = field(default_factory=dict)

    def add(self, responses: Tensor, rollouts: Rollouts, result: MiniBatchResult, old_log_probs: Tensor) -> None:
        """Add the values of a mini-batch.

        responses: indices in the step of the mini-batch's responses; rollouts: of these; old_log_probs [T]: of theirs.
        """
        wanted = [(place, row) for place, row in enumerate(responses.tolist()) if row in self.rows]
        if not wanted:
            return
        weights = (-len(result.token_weights) * result.token_weights).cpu().numpy()
        log_ratios = (result.log_probs.double() - old_log_probs.double()).cpu().numpy()
        offsets = rollouts.response_offsets.tolist()
        for place, row in wanted:
            tokens = slice(offsets[place], offsets[place + 1])
            self.by_response[row] = ResponseValues(weights[tokens], log_ratios[tokens])
