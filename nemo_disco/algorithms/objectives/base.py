"""Objective: a plain function J of one mini-batch's log-probs, which this module differentiates.

Touches MiniBatch alone, in float64 on its device. Must not know how log-probs are computed, nor micro-batches: the
step uses `token_weights` (two passes), or `token_loss` if the objective is separable (one pass).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from nemo_disco.algorithms.objectives.constraint import DUAL, UNCONSTRAINED, Constraint
from nemo_disco.algorithms.objectives.mini_batch import MiniBatch, NonFiniteError
from nemo_disco.algorithms.objectives.off_policy import UNCORRECTED, OffPolicy, scale_gradient
from nemo_disco.algorithms.objectives.parameters import ParameterSet, parameter
from nemo_disco.algorithms.objectives.scores import k3
from nemo_disco.algorithms.objectives.signals import Signal
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.user_code import call_guarded, definition_place, is_user_class, user_methods

TokenLoss = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


@dataclass(frozen=True, eq=False)
class ObjectiveOutput:
    """Result of an objective on one mini-batch: the loss has the gradient of sum_t w_t lp_t + v_t H_t + u_t D_t.

    loss: 0-d float64, detached. token_weights w [T] = d loss / d log_probs. entropy_weights v [T] = d loss /
    d entropies, or None if J has no entropy in it. divergence_weights u [T] = d loss / d divergences, or None if the
    penalty does not read them or has no gradient. metrics: under the names of metrics.jsonl.
    """

    loss: Tensor
    token_weights: Tensor
    entropy_weights: Tensor | None
    metrics: dict[str, float]
    divergence_weights: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Objective(ParameterSet, ABC):
    """loss = -J + penalty(KL_hat). A subclass defines J; its fields are the parameters of the configuration.

    Your own, selected by `algorithm=base algorithm.name=my_module:MyObjective`:

        @dataclass(frozen=True, kw_only=True)
        class MyObjective(Objective):
            scale: float = parameter(1.0, above=0)

            def value(self, batch: MiniBatch) -> Tensor:
                return self.scale * (batch.token_mean(batch.log_probs) * batch.rewards).mean()

    threshold: a response is correct when its reward is above, unless the mini-batch has the grader's verdict.
    off_policy: the correction for rollouts of another engine or an older policy.
    """

    name: ClassVar[str]
    threshold: float = parameter(0.5)
    constraint: Constraint = UNCONSTRAINED
    off_policy: OffPolicy = UNCORRECTED

    def __init_subclass__(cls) -> None:
        if "name" not in vars(cls):
            cls.name = cls.__name__
        if "requires" in vars(cls):  # its name until 0.1; it would be ignored
            raise TypeError(f"objective {cls.name}: rename the property `requires` to `needs`")

    def label(self) -> str:
        """The beginning of a message about a parameter."""
        return f"objective {self.name}: "

    @abstractmethod
    def value(self, batch: MiniBatch) -> Tensor:
        """J, 0-d, to be maximised, without the constraint. batch: float64, log_probs and entropies differentiable,
        `correct` set, its rewards those of `shaped`."""

    def shaped(self, batch: MiniBatch) -> Tensor:
        """[N] the rewards that J uses: here the mini-batch's; a length method transforms them."""
        return batch.rewards

    @property
    def needs(self) -> frozenset[str]:
        """The optional fields and columns of MiniBatch that J reads."""
        return frozenset()

    @property
    def reward_terms(self) -> dict[str, str]:
        """Columns that are values of a reward term: column -> term (a name of reward.terms, or module:function)."""
        return {}

    def signals(self) -> list[Signal]:
        """New Signal objects, one for each other column that J reads."""
        return []

    @property
    def separable(self) -> bool:
        """True if the loss is a sum over tokens given counts and rewards: one pass is then enough (`token_loss`)."""
        return False

    def diagnostics(self, batch: MiniBatch) -> dict[str, float]:  # noqa: ARG002 - an objective may have none
        """Further metrics of the objective's own, by their names in metrics.jsonl. batch: as for `value`."""
        return {}

    def correct(self, batch: MiniBatch) -> Tensor:
        """[N] bool: the grader's verdict, or rewards > threshold."""
        return batch.rewards > self.threshold if batch.correct is None else batch.correct

    def __call__(self, batch: MiniBatch) -> ObjectiveOutput:
        """The loss, its gradient with respect to every log-prob (and entropy), and the metrics.

        Raises ValueError if the batch lacks a field that the objective needs, NonFiniteError if the loss overflows, and
        UserError, with file and line, if a user's objective raises or returns no finite number.
        """
        self._check_needs(batch, self.needs | self.off_policy.needs | self.constraint.needs)
        with torch.inference_mode(False), torch.enable_grad():
            batch = self._prepare(batch)
            names = ["log_probs", *sorted((self.needs | self.constraint.needs) & {"entropies", "divergences"})]
            leaves = [batch[name].requires_grad_() for name in names]
            value = self._call(self.value, self.off_policy.apply(batch))
            if value.ndim:
                raise UserError(
                    f"objective {self.name}: value must return a 0-d tensor; its shape is {list(value.shape)}"
                )
            kl = self.constraint_kl(batch)
            penalty = self.constraint.penalty(kl)
            loss = penalty - value
            active, pulls = self.constraint.active(float(kl.detach())), None
            if active:
                pulls = torch.autograd.grad(penalty, leaves, retain_graph=True, materialize_grads=True)
            gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
        self._check_finite(batch, loss, *gradients)
        weights, ratio = dict(zip(names, gradients, strict=True)), {}
        if pulls is not None:
            pull = dict(zip(names, pulls, strict=True))
            ratio["constraint/gradient_ratio"] = _gradient_ratio(batch, weights, pull)
        return ObjectiveOutput(
            loss=loss.detach(),
            token_weights=weights["log_probs"],
            entropy_weights=weights.get("entropies"),
            metrics=self._metrics(batch, value.detach(), kl.detach(), penalty.detach()) | ratio,
            divergence_weights=weights.get("divergences") if active else None,
        )

    def constraint_kl(self, batch: MiniBatch) -> Tensor:
        """KL_hat, 0-d: the constraint's estimate of KL(old || policy) over all tokens of the mini-batch."""
        terms = self.constraint.token_terms(batch.log_probs, batch.old_log_probs, batch.divergences)
        return terms.sum() / max(batch.n_tokens, 1)

    def _prepare(self, batch: MiniBatch) -> MiniBatch:
        """A float64 copy with verdicts and with the shaped rewards."""
        batch = batch.to_float64()
        batch = replace(batch, correct=self.correct(batch))
        return replace(batch, rewards=self._call(self.shaped, batch))

    def _call(self, function: Callable[..., Tensor], *args: object) -> Tensor:
        """function(*args). If a user wrote it and it fails: UserError with file and line."""
        if not is_user_class(type(self)):
            return function(*args)
        result = call_guarded(f"objective {self.name}", user_methods(type(self)), lambda: function(*args))
        if not isinstance(result, Tensor) or not bool(result.isfinite().all()):
            raise UserError(
                f"objective {self.name}: {definition_place(function)} must return a finite tensor; it returned {result}"
            )
        return result

    def _check_needs(self, batch: MiniBatch, names: frozenset[str]) -> None:
        if missing := sorted(name for name in names if batch.get(name) is None):
            raise ValueError(f"objective {self.name} needs the mini-batch's {' and '.join(missing)}")

    @torch.no_grad()
    def _check_finite(self, batch: MiniBatch, loss: Tensor, *gradients: Tensor) -> None:
        if all(bool(x.isfinite().all()) for x in (loss, *gradients)):
            return
        fault = f"the loss is {float(loss)}, or its gradient is not finite"
        if is_user_class(type(self)):
            raise UserError(f"objective {self.name} ({definition_place(type(self).value)}): {fault}")
        t = int((batch.log_probs - batch.old_log_probs).abs().argmax())
        change = float(batch.log_probs[t] - batch.old_log_probs[t])
        raise NonFiniteError(
            f"objective {self.name}: {fault}; the log-prob that moved most, by {change:g}, is {batch.describe_token(t)}"
        )

    @torch.no_grad()
    def _metrics(self, batch: MiniBatch, value: Tensor, kl: Tensor, penalty: Tensor) -> dict[str, float]:
        constraint, total = self.constraint, max(batch.n_tokens, 1)
        correct = batch.groups.table(self.correct(batch))
        mixed = correct.any(1) & (~correct & batch.groups.present).any(1)
        metrics = {
            "objective/value": float(value),
            "constraint/kl": float(kl),
            "constraint/active": float(constraint.active(float(kl))),
            "constraint/penalty": float(penalty),
            "groups/mixed": float(mixed.double().mean()),
        }
        for name, terms in kl_terms(batch.log_probs, batch.old_log_probs).items():
            metrics[f"policy/kl{name}"] = float(terms.sum()) / total
            metrics[f"policy/kl{name}_stderr"] = float(terms.std()) / total**0.5 if batch.n_tokens > 1 else 0.0
        if constraint.limit is not None:
            metrics["constraint/delta"] = constraint.limit
        if constraint.limit:
            metrics["constraint/kl_over_delta"] = float(kl) / constraint.limit
        if constraint.kind == DUAL:
            metrics["constraint/beta"] = constraint.strength
        if batch.entropies is not None:
            metrics["policy/entropy"] = float(batch.entropies.sum()) / total
        if type(self).shaped is not Objective.shaped:
            metrics["reward/shaped_mean"] = float(batch.rewards.mean())
        return metrics | self.off_policy.metrics(batch) | self.diagnostics(batch)


@dataclass(frozen=True)
class Tokens:
    """Some tokens of a mini-batch, float64 [n] each; total is T, the tokens of the whole mini-batch, at least 1.

    weights: `response_weights` of the token's response. entropies, reference_log_probs: None if not needed.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    weights: Tensor
    entropies: Tensor | None
    reference_log_probs: Tensor | None
    total: int


class SeparableObjective(Objective):
    """J = sum_t token_values_t; a token depends on the others only through its response's weight."""

    @abstractmethod
    def response_weights(self, batch: MiniBatch) -> Tensor:
        """[N] the weight in J of each token of a response: an advantage over a divisor, without any log-prob."""

    @abstractmethod
    def token_values(self, tokens: Tokens) -> Tensor:
        """[n] each token's share of J, elementwise."""

    @property
    def separable(self) -> bool:
        return self.constraint.linear

    def value(self, batch: MiniBatch) -> Tensor:
        indices = torch.arange(batch.n_tokens, device=batch.log_probs.device)
        return self.token_values(self._tokens(batch)(indices, batch.log_probs, batch.entropies)).sum()

    def token_loss(self, batch: MiniBatch) -> TokenLoss:
        """The loss of some tokens, given the rest: f(index, log_probs, entropies, divergences) -> [n] float64.

        index [n]: positions among the T tokens; the others [n]: the current ones, differentiable, of any floating dtype
        and device; entropies and divergences may be None if not needed. Summed over all tokens it is the loss of
        `__call__`. Their fields in `batch` are not read.
        Raises ValueError if the objective is not separable or the batch lacks a field that it needs.
        """
        if not self.separable:
            raise ValueError(
                f"objective {self.name} is not separable under {self.constraint.kind}: its loss needs two passes"
            )
        self._check_needs(batch, (self.needs | self.off_policy.needs) - {"entropies"})
        batch = self._prepare(batch)
        pick, factors = self._tokens(batch), self.off_policy.factors(batch)

        def loss(
            index: Tensor, log_probs: Tensor, entropies: Tensor | None = None, divergences: Tensor | None = None
        ) -> Tensor:
            tokens = pick(index, log_probs, entropies)
            if divergences is None and self.constraint.likely_tokens:
                raise ValueError(f"objective {self.name} needs the tokens' divergences")
            divergences = None if divergences is None else divergences.double()
            terms = self.constraint.token_terms(tokens.log_probs, tokens.old_log_probs, divergences)
            factor = factors[index.to(factors.device)].to(log_probs.device)
            # Linear in KL_hat, so the penalty of a share is that share of the penalty.
            values = self._call(self.token_values, replace(tokens, log_probs=scale_gradient(tokens.log_probs, factor)))
            return self.constraint.penalty(terms / tokens.total) - values

        return loss

    def _tokens(self, batch: MiniBatch) -> Callable[[Tensor, Tensor, Tensor | None], Tokens]:
        weights = batch.spread(self._call(self.response_weights, batch))

        def pick(index: Tensor, log_probs: Tensor, entropies: Tensor | None) -> Tokens:
            if entropies is None and "entropies" in self.needs:
                raise ValueError(f"objective {self.name} needs the tokens' entropies")

            def select(values: Tensor) -> Tensor:
                return values[index.to(values.device)].to(log_probs.device)

            reference = batch.reference_log_probs
            return Tokens(
                log_probs=log_probs.double(),
                old_log_probs=select(batch.old_log_probs),
                weights=select(weights),
                entropies=None if entropies is None else entropies.double(),
                reference_log_probs=None if reference is None else select(reference),
                total=max(batch.n_tokens, 1),
            )

        return pick


def kl_terms(log_probs: Tensor, old_log_probs: Tensor) -> dict[str, Tensor]:
    """[T] each token's terms of two estimates of KL(old || policy), by the suffix of their metric: k1 and k3."""
    return {"": old_log_probs - log_probs, "_k3": k3(old_log_probs, log_probs)}


def _gradient_ratio(batch: MiniBatch, weights: Mapping[str, Tensor], pull: Mapping[str, Tensor]) -> float:
    """Norm of the penalty's gradient over that of J's, both with respect to the log-probs; 0 where J has none.

    weights, pull: gradients of the loss and of the penalty, by field. A gradient with respect to the divergences is
    taken as that of k3, which estimates the same KL from the log-probs.
    """
    value = (weights["log_probs"] - pull["log_probs"]).norm()
    penalty = pull["log_probs"]
    if "divergences" in pull:
        penalty = penalty + pull["divergences"] * (batch.log_probs - batch.old_log_probs).detach().expm1()
    return float(penalty.norm() / value) if value else 0.0
