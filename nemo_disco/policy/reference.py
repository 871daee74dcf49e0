"""The reference policy: frozen, sharded like the policy; computes log-probs once per step.

On a GPU its weights are in the host's memory between those passes (not run); on a CPU there is nothing to move.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_disco.data.rollouts import Rollouts
from nemo_disco.policy.policy import Policy


class Reference:
    """A frozen policy. moved: True if it is no longer the model at model.path, so that checkpoints must contain it."""

    def __init__(self, policy: Policy) -> None:
        """policy: one without an optimizer, which nothing else uses."""
        self.policy, self.moved = policy, False
        self._move(torch.device("cpu"))

    def log_probs(self, rollouts: Rollouts) -> Tensor:
        """[T] log-probs of every response token, on every rank."""
        self._move(self.policy.device)
        log_probs, _ = self.policy.log_probs(rollouts)
        self._move(torch.device("cpu"))
        return log_probs

    def become(self, policy: Policy) -> None:
        """Copy the present weights of a policy of the same layout (STILL-3, arXiv 2503.04548)."""
        policy.gather_weights()
        for own, other in zip(self.policy.model.chunks, policy.model.chunks, strict=True):
            for p, q in zip(own.parameters(), other.parameters(), strict=True):
                p.data.copy_(q.data)
        self.moved = True

    def _move(self, device: torch.device) -> None:
        for chunk in self.policy.network:
            chunk.to(device)
