"""DisCO with its constraint evaluated in each micro-batch, as in the papers' released code.

Loaded like any objective of a user (`algorithm.name=benchmarks.study.objectives:PerMicroBatch`), since nemo_disco
evaluates the constraint over the whole mini-batch only.
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
    """J2 - mean over micro-batches j of beta max(KL_j - delta, 0)^2, where J2 is DisCO's objective without constraint.

    A micro-batch has `questions` questions, and KL_j is the estimate k1 over its tokens. With all questions in one
    micro-batch the loss is DisCO's with the estimator k1 (arXiv 2505.12366, Algorithm 1).
    """

    constraint: Constraint = UNCONSTRAINED
    beta: float = parameter(1e3, at_least=0)
    delta: float = parameter(1e-4, at_least=0)
    questions: int = parameter(2, above=0)

    def value(self, batch: MiniBatch) -> Tensor:
        """J, to be maximised: a scalar with a gradient in the batch's log-probs."""
        micro_batch = batch.spread(batch.groups.row // self.questions)  # [T] number of each token's micro-batch
        count = -(-len(batch.groups) // self.questions)
        sums = batch.log_probs.new_zeros(count).index_add(0, micro_batch, batch.old_log_probs - batch.log_probs)
        tokens = batch.log_probs.new_zeros(count).index_add(0, micro_batch, batch.log_probs.detach() * 0 + 1)
        hinge = Constraint(kind=SQUARED_HINGE, beta=self.beta, delta=self.delta)
        return super().value(batch) - hinge.penalty(sums / tokens.clamp(min=1)).mean()
