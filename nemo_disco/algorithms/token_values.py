"""What training said of the tokens of the responses that are saved to read: the objective's weight, and the log-ratio.

Filled by the step, mini-batch by mini-batch; decides nothing.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nemo_disco.algorithms.step import Accumulated
from nemo_disco.data.rollouts import Rollouts


@dataclass(frozen=True)
class OfTokens:
    """Of one response's tokens: weights = - T d loss / d log-prob, T the mini-batch's tokens, so that above 0 makes a
    token likelier and the size does not depend on T; log_ratios = log policy - log old policy, as the objective saw
    it (0 in a step's first mini-batch)."""

    weights: NDArray[np.float64]
    log_ratios: NDArray[np.float64]


@dataclass
class TokenValues:
    """rows: which of the step's responses are wanted. found: of those that were in a mini-batch that was applied."""

    rows: Container[int]
    found: dict[int, OfTokens] = field(default_factory=dict)

    def take(self, responses: Tensor, part: Rollouts, taken: Accumulated, old_log_probs: Tensor) -> None:
        """part: the mini-batch, of the step's `responses`. old_log_probs: [T] of its tokens."""
        wanted = [(place, row) for place, row in enumerate(responses.tolist()) if row in self.rows]
        if not wanted:
            return
        total = len(taken.token_weights)
        weights = (-total * taken.token_weights).cpu().numpy()
        ratios = (taken.log_probs.double() - old_log_probs.double()).cpu().numpy()
        ends = part.response_offsets.tolist()
        for place, row in wanted:
            span = slice(ends[place], ends[place + 1])
            self.found[row] = OfTokens(weights[span], ratios[span])
