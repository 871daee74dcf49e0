"""A user's objective, for jobs that the tests interrupt: DisCO, which is slow in a job's first life.

PACE_S: seconds that each mini-batch waits. HOLD_START_S: seconds that the start waits, before anything is trained.
BREAK: a file; once it exists, rank 0 raises a RuntimeError.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nemo_disco.algorithms import MiniBatch
from nemo_disco.algorithms.objectives.disco import DisCO

FIRST_LIFE = "SLURM_RESTART_COUNT" not in os.environ and os.environ.get("SLURM_ARRAY_TASK_ID", "1") == "1"
PACE_S = float(os.environ.get("PACE_S", 0)) if FIRST_LIFE else 0.0
time.sleep(float(os.environ.get("HOLD_START_S", 0)))  # a request to stop ends it here, as it ends every start


@dataclass(frozen=True, kw_only=True)
class Paced(DisCO):
    name: ClassVar[str] = "paced"

    def value(self, batch: MiniBatch) -> Tensor:
        time.sleep(PACE_S)
        if os.environ["SLURM_PROCID"] == "0" and os.path.exists(os.environ.get("BREAK", "")):
            raise RuntimeError("broken on purpose")
        return super().value(batch)
