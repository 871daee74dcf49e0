"""Optimizer steps of a policy on random rollouts, and a checksum of the resulting state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from tiny_models import random_rollouts

from nemo_disco.policy.policy import Policy


def loss(policy: Policy, seed: int) -> float:
    """The mean of the randomly weighted log-probs of the random rollouts of `seed`, under the policy."""
    rollouts = random_rollouts(seed=seed)
    weights = torch.randn(int(rollouts.response_lengths.sum()), generator=torch.Generator().manual_seed(seed)).double()
    return float((weights * policy.log_probs(rollouts)[0].double()).sum() / len(weights))


def train(policy: Policy, seeds: Iterable[int]) -> None:
    """Take one optimizer step on the random rollouts of each seed, with random token weights."""
    for seed in seeds:
        rollouts = random_rollouts(seed=seed)
        total = int(rollouts.response_lengths.sum())
        weights = torch.randn(total, generator=torch.Generator().manual_seed(seed)) / total
        policy.accumulate(rollouts, lambda index, values, w=weights: w[index] * values.log_probs)  # type: ignore[misc]
        assert policy.step().applied


def fingerprint(policy: Policy) -> str:
    """SHA-256 of the weights and the optimizer's state on this rank, as hexadecimal text. A collective."""
    policy.gather_weights()
    digest = hashlib.sha256()
    for chunk in policy.model.chunks:
        for p in chunk.parameters():
            digest.update(p.detach().view(torch.uint8).numpy().tobytes())
    assert policy.optimizer is not None
    for part in policy.optimizer._parts:
        for group in part.optimizer.param_groups:
            digest.update(repr((group["lr"], group["weight_decay"])).encode())
            for p in group["params"]:
                state = part.optimizer.state[p]
                for tensor in (p, state["exp_avg"], state["exp_avg_sq"], state["step"].reshape(1)):
                    digest.update(tensor.detach().numpy().tobytes())
    return digest.hexdigest()
