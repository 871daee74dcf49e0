"""The exact gradient of one mini-batch for any objective: log-probs, then token weights, then a linear pass.

DisCO is not separable over micro-batches: the softmax over a question's wrong responses and the hinge on the
mini-batch's KL need every response first. Knows the contracts of policy and objective; neither packing nor layout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_disco.algorithms.mismatch import mismatch
from nemo_disco.algorithms.objectives import Objective, SeparableObjective
from nemo_disco.algorithms.objectives.constraint import K1
from nemo_disco.algorithms.objectives.mini_batch import MiniBatch, NonFiniteError
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.policy.likely_tokens import LikelyTokens
from nemo_disco.policy.model import TargetValues
from nemo_disco.policy.policy import Policy
from nemo_disco.policy.routes import Routes
from nemo_disco.runtime.spans import span

# The optional fields of MiniBatch that every step provides; an objective declares further ones itself, as columns.
PROVIDED = frozenset(
    {"entropies", "divergences", "reference_log_probs", "generation_log_probs", "correct", "truncated"}
)


@dataclass(frozen=True)
class OldValues:
    """Values of the T response tokens from before the step: log_probs [T], entropies [T] and the likeliest tokens
    [T, K] of the policy that the step begins with, reference_log_probs [T] of the reference; all but the first only
    where the objective needs them. routes: the experts of all tokens, prompts included, which the policy replays."""

    log_probs: Tensor
    entropies: Tensor | None = None
    reference_log_probs: Tensor | None = None
    likely: LikelyTokens | None = None
    routes: Routes | None = None

    @classmethod
    def compute(cls, policy: Policy, objective: Objective, rollouts: Rollouts, reference: Tensor | None) -> OldValues:
        """Those of the policy's present weights. reference [T]: the reference's log-probs. A collective."""
        routes = policy.router_replay(rollouts)
        values = policy.target_values(
            rollouts, entropies=True, likely_tokens=objective.constraint.likely_tokens, routes=routes
        )
        routes = values.routes if routes == "record" else routes
        return cls(values.log_probs, values.entropies, reference, values.likely, routes)

    def select(self, rollouts: Rollouts, responses: Tensor) -> OldValues:
        """The values of some of the rollouts' responses."""
        index = rollouts.token_index(responses).to(self.log_probs.device)
        entropies, reference = self.entropies, self.reference_log_probs
        return OldValues(
            self.log_probs[index],
            None if entropies is None else entropies[index],
            None if reference is None else reference[index],
            None if self.likely is None else self.likely.select(index),
            None if self.routes is None else self.routes.select(rollouts, responses),
        )


@dataclass(frozen=True)
class MiniBatchResult:
    """Result of one mini-batch: metrics, log-probs [T], and token_weights [T] = d loss / d log-prob."""

    metrics: dict[str, float]
    log_probs: Tensor
    token_weights: Tensor


def accumulate_gradient(
    policy: Policy,
    objective: Objective,
    rollouts: Rollouts,
    old: OldValues,
    *,
    first: bool = False,
    everywhere: bool = False,
) -> MiniBatchResult:
    """Accumulate the gradient of the objective's loss on one mini-batch in the policy.

    rollouts: of the mini-batch; old: the values of their T tokens.
    first: theta is still the old policy, so that the old log-probs are the present ones and pass 1 is left out; then
    "policy/noise_floor" is |KL_hat| of the policy against itself, computed twice in other micro-batches.
    everywhere: reduce the whole gradient on every rank (Policy.accumulate).
    Raises NonFiniteError, on every rank, if the log-probs or the loss are not finite; the gradient is then undefined.
    """
    needs_entropies = "entropies" in objective.needs
    if isinstance(objective, SeparableObjective) and objective.separable:
        return _one_pass(policy, objective, rollouts, old, first, everywhere)

    with span("log_probs"), span("pass1"):
        if first and (old.entropies is not None or not needs_entropies):
            same = None if old.likely is None else torch.zeros_like(old.log_probs)
            present = TargetValues(old.log_probs, old.entropies, same)
        else:
            present = policy.target_values(rollouts, entropies=needs_entropies, old=old.likely, routes=old.routes)
    out = objective(_mini_batch(policy, rollouts, old, present))

    pass2_log_probs = torch.zeros(len(old.log_probs) if first else 0, dtype=torch.float64, device=policy.device)

    def linear(index: Tensor, values: TargetValues) -> Tensor:
        if first:
            pass2_log_probs[index] = values.log_probs.detach().double()
        loss = out.token_weights[index].to(values.log_probs.dtype) * values.log_probs
        for weights, value in ((out.entropy_weights, values.entropies), (out.divergence_weights, values.divergences)):
            if weights is not None and value is not None:
                loss = loss + weights[index].to(value.dtype) * value
        return loss

    compared = old.likely if out.divergence_weights is not None else None
    with span("train"):
        changed = policy.accumulate(
            rollouts,
            linear,
            entropies=out.entropy_weights is not None,
            old=compared,
            routes=old.routes,
            everywhere=everywhere,
        )
        pass2_log_probs = policy.share(pass2_log_probs) if first else pass2_log_probs
    noise = {"policy/noise_floor": noise_floor(objective, old.log_probs, pass2_log_probs)} if first else {}
    return MiniBatchResult(out.metrics | noise | _changed(changed), present.log_probs, out.token_weights)


def measure_kl(policy: Policy, rollouts: Rollouts, old: OldValues) -> float:
    """KL(old || policy) of the present weights on some rollouts, in nats a token: over old's likely tokens if it has
    them (the constraint's estimator is top_k), else by k3. old: the values of their tokens. A collective."""
    present = policy.target_values(rollouts, old=old.likely, routes=old.routes)
    if present.divergences is not None:
        return float(present.divergences.double().mean())
    return mismatch(present.log_probs, old.log_probs)["mismatch/kl_k3"]


def _changed(share: float | None) -> dict[str, float]:
    return {} if share is None else {"experts/changed": share}


def _mini_batch(policy: Policy, rollouts: Rollouts, old: OldValues, present: TargetValues) -> MiniBatch:
    """The objective's input, on the policy's device. present: the values of the present weights."""
    return MiniBatch(
        log_probs=present.log_probs,
        old_log_probs=old.log_probs,
        lengths=rollouts.response_lengths.to(policy.device),
        question_ids=rollouts.question_ids.to(policy.device),
        rewards=rollouts.rewards.to(policy.device),
        max_response_length=rollouts.max_response_length,
        entropies=present.entropies,
        divergences=present.divergences,
        reference_log_probs=old.reference_log_probs,
        generation_log_probs=rollouts.generation_log_probs.to(policy.device),
        correct=rollouts.correct.to(policy.device),
        truncated=rollouts.truncated.to(policy.device),
        columns={name: values.to(policy.device) for name, values in rollouts.columns.items()},
    )


def noise_floor(objective: Objective, old_log_probs: Tensor, recomputed: Tensor) -> float:
    """|KL_hat| that rounding makes at theta = theta_old, by k1 if the constraint's estimator is that, else by k3.

    recomputed [T]: the same policy's log-probs, a second time. Rounding errors average out in k1, but not in k3.
    """
    estimator = "k1" if objective.constraint.estimator == K1 else "k3"
    return abs(mismatch(recomputed, old_log_probs)[f"mismatch/kl_{estimator}"])


def _one_pass(
    policy: Policy,
    objective: SeparableObjective,
    rollouts: Rollouts,
    old: OldValues,
    first: bool,
    everywhere: bool,
) -> MiniBatchResult:
    """`accumulate_gradient` for an objective whose tokens need only the others' counts and rewards: its loss goes
    straight into the backward pass, whose log-probs are also those of the metrics."""
    batch = _mini_batch(policy, rollouts, old, TargetValues(old.log_probs))
    token_loss = objective.token_loss(batch)
    fields = ["log_probs"] + ["entropies"] * ("entropies" in objective.needs)
    fields += ["divergences"] * (old.likely is not None)
    computed = torch.zeros(len(fields), batch.n_tokens, dtype=torch.float64, device=policy.device)

    def loss(index: Tensor, values: TargetValues) -> Tensor:
        for row, name in zip(computed, fields, strict=True):
            row[index] = getattr(values, name).detach().double()
        return token_loss(index, values.log_probs, values.entropies, values.divergences)

    with span("train"):
        changed = policy.accumulate(
            rollouts,
            loss,
            entropies="entropies" in fields,
            old=old.likely,
            routes=old.routes,
            everywhere=everywhere,
        )
        computed = policy.share(computed)
    if not bool(computed.isfinite().all()):
        raise NonFiniteError(f"objective {objective.name}: the policy's log-probs are not finite")
    out = objective(replace(batch, **dict(zip(fields, computed, strict=True))))
    noise = {"policy/noise_floor": noise_floor(objective, batch.old_log_probs, computed[0])} if first else {}
    return MiniBatchResult(out.metrics | noise | _changed(changed), computed[0], out.token_weights)
