"""Detects a run that has diverged: counts mini-batches that were not applied, and tests weights before they are kept.

Reads the policy; writes no file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nemo_disco.algorithms.mismatch import mismatch
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.policy.policy import Policy

# A run ends after this many mini-batches in a row without a finite gradient: it will not recover by itself.
MAX_SKIPPED = 3


@dataclass(eq=False)
class Divergence:
    """Follows the mini-batches of a run: call `begin` before each, then `record_update` or `skip`.

    While mini-batches are being skipped no weights are kept: no checkpoint, no best/, no export/. Nor are weights with
    a fault (`find_fault`), which a step's last update may have caused unnoticed. Useless weights without one of these
    faults are not detected here: the metrics and the evaluations show them.
    """

    policy: Policy
    skipped: int = 0  # mini-batches of the whole run that were not applied
    in_a_row: int = 0  # mini-batches skipped since the last update
    updated_since_checkpoint: bool = False
    _last: tuple[Rollouts, Tensor] | None = None
    _fault: str | None = None

    def begin(self, mini_batch: Rollouts, old_log_probs: Tensor) -> None:
        """Start on a mini-batch. old_log_probs [T]: the policy's, before the step."""
        self._last, self._fault = (mini_batch, old_log_probs), None

    def record_update(self) -> None:
        """Record that the mini-batch has updated the weights."""
        self.updated_since_checkpoint, self.in_a_row = True, 0

    def record_checkpoint(self) -> None:
        """Record that a checkpoint of the present weights is being written."""
        self.updated_since_checkpoint = False

    def skip(self) -> bool:
        """Count a mini-batch that is not applied; returns True if the run is to end."""
        self.skipped += 1
        self.in_a_row += 1
        return self.in_a_row >= MAX_SKIPPED

    def find_fault(self) -> str:
        """A proven fault of the present weights, or "". A collective: a forward and a backward pass on the last
        mini-batch, once after each update, which change nothing."""
        if self._fault is None:
            self._fault = "" if self._last is None else self._check_weights(*self._last)
        return self._fault

    def _check_weights(self, mini_batch: Rollouts, old_log_probs: Tensor) -> str:
        policy = self.policy
        log_probs = policy.log_probs(mini_batch)[0]
        if not bool(log_probs.isfinite().all()) or not policy.has_finite_weights():
            return "its update left weights or log-probs that are not finite"
        kl = mismatch(log_probs, old_log_probs)["mismatch/kl_k1"]  # not the engine's, which may be another policy
        if kl > math.log(policy.vocabulary):
            return (
                "after its update the policy gives the step's own responses less probability than a guess among all "
                f"{policy.vocabulary:,} tokens would ({kl:.1f} nats a token from the policy before the step)"
            )
        # Under delayed scaling a pass with a gradient would change the scales.
        if policy.config.fp8 != "delayed" and not math.isfinite(policy.gradient_norm(mini_batch)):
            return "its update left weights whose gradient is not finite"
        return ""

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "skipped_in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["skipped_in_a_row"]
