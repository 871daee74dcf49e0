"""Whether a run has diverged: counts mini-batches that were not applied, and tests weights before they are kept.

Reads the policy; writes no file.
"""

from __future__ import annotations

from typing import Any

from nemo_disco.data.rollouts import Rollouts
from nemo_disco.policy.policy import Policy

# So many mini-batches in a row whose gradient is not finite end the run: it will not heal by itself.
MAX_SKIPPED = 3


class Divergence:
    """The state of a run's mini-batches: `applied` and `skip` after each, `begin` before those of a step.

    While mini-batches are being skipped nothing is kept: no checkpoint, no best/, no export/. Nor is it where the
    weights give log-probs that are not finite, which a step's last update may have made them do unnoticed.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.skipped = 0  # mini-batches of the whole run that were not applied
        self.in_a_row = 0
        self.moved = False  # whether a mini-batch was applied in this life
        self._seen: Rollouts | None = None
        self._sound: bool | None = None

    def begin(self, mini_batch: Rollouts) -> None:
        """mini_batch: the one that is trained on now."""
        self._seen, self._sound = mini_batch, None

    def applied(self) -> None:
        self.moved, self.in_a_row = True, 0

    def skip(self) -> bool:
        """Count a mini-batch that is not applied; whether the run is to end."""
        self.skipped += 1
        self.in_a_row += 1
        return self.in_a_row >= MAX_SKIPPED

    def sound(self) -> bool:
        """Whether the present weights give finite log-probs on the last mini-batch. A collective; one forward pass,
        once after each update, without an effect on what follows."""
        if self._sound is None:
            self._sound = self._seen is None or bool(self._policy.log_probs(self._seen)[0].isfinite().all())
        return self._sound

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "skipped_in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["skipped_in_a_row"]
