"""The exact gradient of one mini-batch for any objective: log-probs, then token weights, then a linear pass.

DisCO is not separable over micro-batches: the softmax over a question's wrong responses and the hinge on the
mini-batch's KL need every response first. Knows the contracts of policy and objective; neither packing nor layout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from nemo_disco.algorithms.mismatch import mismatch
from nemo_disco.algorithms.objectives import Objective, SeparableObjective
from nemo_disco.algorithms.objectives.mini_batch import MiniBatch, NonFiniteError
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.policy.policy import Policy
from nemo_disco.runtime.spans import span

# The optional fields of MiniBatch that every step provides; an objective declares further ones itself, as columns.
PROVIDED = frozenset({"entropies", "reference_log_probs", "generation_log_probs", "correct", "truncated"})


@dataclass(frozen=True)
class OldValues:
    """Values of the T response tokens from before the step: log_probs [T] and entropies [T] of the policy that the step
    begins with, reference_log_probs [T] of the reference; the last two only where the objective needs them."""

    log_probs: Tensor
    entropies: Tensor | None = None
    reference_log_probs: Tensor | None = None

    def select(self, index: Tensor) -> OldValues:
        """The values of the tokens at index [n], positions among the T tokens."""
        index = index.to(self.log_probs.device)
        entropies, reference = self.entropies, self.reference_log_probs
        return OldValues(
            self.log_probs[index],
            None if entropies is None else entropies[index],
            None if reference is None else reference[index],
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
    mini_batch = partial(_mini_batch, policy, rollouts, old)
    if isinstance(objective, SeparableObjective) and objective.separable:
        return _one_pass(policy, objective, rollouts, mini_batch(old.log_probs, old.entropies), first, everywhere)

    with span("log_probs"), span("pass1"):
        if first and (old.entropies is not None or not needs_entropies):
            log_probs, entropies = old.log_probs, old.entropies
        else:
            log_probs, entropies = policy.log_probs(rollouts, entropies=needs_entropies)
    out = objective(mini_batch(log_probs, entropies))

    pass2_log_probs = torch.zeros(len(old.log_probs) if first else 0, dtype=torch.float64, device=policy.device)

    def linear(index: Tensor, log_probs: Tensor, entropies: Tensor | None) -> Tensor:
        if first:
            pass2_log_probs[index] = log_probs.detach().double()
        loss = out.token_weights[index].to(log_probs.dtype) * log_probs
        if out.entropy_weights is not None and entropies is not None:
            loss = loss + out.entropy_weights[index].to(entropies.dtype) * entropies
        return loss

    with span("train"):
        policy.accumulate(rollouts, linear, entropies=out.entropy_weights is not None, everywhere=everywhere)
        pass2_log_probs = policy.share(pass2_log_probs) if first else pass2_log_probs
    noise = _noise_floor(old.log_probs, pass2_log_probs) if first else {}
    return MiniBatchResult(out.metrics | noise, log_probs, out.token_weights)


def _mini_batch(
    policy: Policy, rollouts: Rollouts, old: OldValues, log_probs: Tensor, entropies: Tensor | None
) -> MiniBatch:
    """The objective's input, on the policy's device."""
    return MiniBatch(
        log_probs=log_probs,
        old_log_probs=old.log_probs,
        lengths=rollouts.response_lengths.to(policy.device),
        question_ids=rollouts.question_ids.to(policy.device),
        rewards=rollouts.rewards.to(policy.device),
        max_response_length=rollouts.max_response_length,
        entropies=entropies,
        reference_log_probs=old.reference_log_probs,
        generation_log_probs=rollouts.generation_log_probs.to(policy.device),
        correct=rollouts.correct.to(policy.device),
        truncated=rollouts.truncated.to(policy.device),
        columns={name: values.to(policy.device) for name, values in rollouts.columns.items()},
    )


def _noise_floor(old_log_probs: Tensor, recomputed: Tensor) -> dict[str, float]:
    """|KL_hat| that rounding makes at theta = theta_old. recomputed [T]: the same policy's log-probs, a second time."""
    return {"policy/noise_floor": abs(mismatch(recomputed, old_log_probs)["mismatch/kl_k1"])}


def _one_pass(
    policy: Policy,
    objective: SeparableObjective,
    rollouts: Rollouts,
    batch: MiniBatch,
    first: bool,
    everywhere: bool,
) -> MiniBatchResult:
    """`accumulate_gradient` for an objective whose tokens need only the others' counts and rewards: its loss goes
    straight into the backward pass, whose log-probs are also those of the metrics."""
    needs_entropies = "entropies" in objective.needs
    token_loss = objective.token_loss(batch)
    computed = torch.zeros(2 if needs_entropies else 1, batch.n_tokens, dtype=torch.float64, device=policy.device)

    def loss(index: Tensor, log_probs: Tensor, entropies: Tensor | None) -> Tensor:
        computed[0, index] = log_probs.detach().double()
        if entropies is not None and needs_entropies:
            computed[1, index] = entropies.detach().double()
        return token_loss(index, log_probs, entropies)

    with span("train"):
        policy.accumulate(rollouts, loss, entropies=needs_entropies, everywhere=everywhere)
        computed = policy.share(computed)
    if not bool(computed.isfinite().all()):
        raise NonFiniteError(f"objective {objective.name}: the policy's log-probs are not finite")
    entropies = computed[1] if needs_entropies else None
    out = objective(replace(batch, log_probs=computed[0], entropies=entropies))
    noise = _noise_floor(batch.old_log_probs, computed[0]) if first else {}
    return MiniBatchResult(out.metrics | noise, computed[0], out.token_weights)
