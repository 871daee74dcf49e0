"""DisCO as it would be if its constraint were evaluated per micro-batch, as the papers' released code does it.

An objective of a user's own (`algorithm.name=benchmarks.study.objectives:PerMicroBatch`); the product has none like it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nemo_disco.algorithms.objectives import Constraint, parameter
from nemo_disco.algorithms.objectives.constraint import SQUARED_HINGE, UNCONSTRAINED
from nemo_disco.algorithms.objectives.disco import DisCO
from nemo_disco.algorithms.objectives.mini_batch import MiniBatch


@dataclass(frozen=True, kw_only=True)
class PerMicroBatch(DisCO):
    """J2 - mean over micro-batches j of beta max(KL_j - delta, 0)^2, KL_j over the tokens of `questions` questions.

    With one micro-batch of all questions it is DisCO's loss (arXiv 2505.12366, Algorithm 1).
    """

    constraint: Constraint = UNCONSTRAINED
    beta: float = parameter(1e3, at_least=0)
    delta: float = parameter(1e-4, at_least=0)
    questions: int = parameter(2, above=0)

    def value(self, batch: MiniBatch) -> Tensor:
        part = batch.spread(batch.groups.row // self.questions)
        parts = -(-len(batch.groups) // self.questions)
        sums = batch.log_probs.new_zeros(parts).index_add(0, part, batch.old_log_probs - batch.log_probs)
        tokens = batch.log_probs.new_zeros(parts).index_add(0, part, batch.log_probs.detach() * 0 + 1)
        hinge = Constraint(kind=SQUARED_HINGE, beta=self.beta, delta=self.delta)
        return super().value(batch) - hinge.penalty(sums / tokens.clamp(min=1)).mean()
