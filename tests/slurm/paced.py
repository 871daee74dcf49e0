"""An objective of a user's own, for jobs that the tests catch while they train: DisCO, slowly in a job's first life."""

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


@dataclass(frozen=True, kw_only=True)
class Paced(DisCO):
    name: ClassVar[str] = "paced"

    def value(self, batch: MiniBatch) -> Tensor:
        time.sleep(PACE_S)
        return super().value(batch)
