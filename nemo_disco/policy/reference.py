"""The reference policy: frozen, sharded like the policy, asked for its log-probs once a step.

On a GPU its weights wait in the host's memory between those passes (not run); on a CPU there is nothing to move.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_disco.data.rollouts import Rollouts
from nemo_disco.policy.policy import Policy


class Reference:
    """moved: whether it is no longer the model that training began with, so that checkpoints must hold it."""

    def __init__(self, policy: Policy) -> None:
        """policy: without an optimizer, and from now on this reference's alone."""
        self.policy, self.moved = policy, False
        self._move(torch.device("cpu"))

    def log_probs(self, rollouts: Rollouts) -> Tensor:
        """[T] of every response token, on every rank."""
        self._move(self.policy.device)
        log_probs, _ = self.policy.log_probs(rollouts)
        self._move(torch.device("cpu"))
        return log_probs

    def become(self, policy: Policy) -> None:
        """Take the weights that a policy of the same layout has now (STILL-3, arXiv 2503.04548)."""
        policy.gather_weights()
        for mine, theirs in zip(self.policy.model.chunks, policy.model.chunks, strict=True):
            for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
                p.data.copy_(q.data)
        self.moved = True

    def _move(self, device: torch.device) -> None:
        for chunk in self.policy.network:
            chunk.to(device)
