"""TRPA (arXiv 2504.04524): pairwise preferences among a question's responses, with a KL to the policy that sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from nemo_disco.algorithms.objectives.base import Objective
from nemo_disco.algorithms.objectives.mini_batch import MiniBatch
from nemo_disco.algorithms.objectives.parameters import parameter
from nemo_disco.algorithms.objectives.scores import k3


@dataclass(frozen=True, kw_only=True)
class TRPA(Objective):
    """J = mean over pairs of log sigmoid(beta [(s - s_old)(better) - (s - s_old)(worse)]) - kl_coefficient KL.

    s is the token mean of lp. Pairs are all pairs of non-empty responses to the same question with different rewards.
    KL is the paper's: the token mean of k3, of the policy to the one that sampled. Differentiated on old's samples, as
    the paper does, it is biased: its expectation is chi^2(old || policy) - KL(old || policy), which equals
    KL(policy || old) to second order only. The released code scales pairs with the top reward level by 2.5; that is not
    done here.
    """

    name: ClassVar[str] = "trpa"
    beta: float = parameter(0.1, above=0)
    kl_coefficient: float = parameter(1e-3, at_least=0)

    def value(self, batch: MiniBatch) -> Tensor:
        rises = batch.groups.table(batch.token_mean(batch.log_probs - batch.old_log_probs))
        rewards = batch.groups.table(batch.rewards)
        scored = batch.groups.table(batch.lengths > 0)
        # [question, better response, worse response]
        pairs = (rewards[:, :, None] > rewards[:, None, :]) & scored[:, :, None] & scored[:, None, :]
        margins = (rises[:, :, None] - rises[:, None, :])[pairs]
        preference = logsigmoid(self.beta * margins).sum() / max(len(margins), 1)
        kl = k3(batch.log_probs, batch.old_log_probs).sum() / max(batch.n_tokens, 1)
        return preference - self.kl_coefficient * kl
