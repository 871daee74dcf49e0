"""Divergence.find_fault finds proven faults of the weights, and no others."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tiny_models import random_rollouts

from nemo_disco.algorithms.divergence import Divergence


@pytest.mark.parametrize(
    ("fault", "changes"),
    [
        ("", {}),
        ("not finite", {"drop": math.nan}),
        ("not finite", {"finite_weights": False}),
        ("gradient is not finite", {"gradient": math.nan}),
        ("", {"drop": 4.5}),
        ("less probability than a guess among all 100 tokens", {"drop": 4.7}),  # log(100) is 4.6
        # Under delayed scaling the gradient is not computed, since that would change the scales.
        ("", {"gradient": math.nan, "fp8": "delayed"}),
    ],
)
def test_the_weights_are_tested_once_after_each_update(fault: str, changes: dict[str, Any]) -> None:
    """changes: of the policy's behavior. drop: by how much the update lowers the log-probs of the sampled tokens."""
    behaviour: dict[str, Any] = {"drop": 0.0, "finite_weights": True, "gradient": 1.0, "fp8": None} | changes
    rollouts = random_rollouts()
    old = torch.full_like(rollouts.generation_log_probs, -9.0)  # the engine's own, 0, must not be compared
    policy = Mock(vocabulary=100)
    policy.config.fp8 = behaviour["fp8"]
    policy.log_probs.return_value = (old - behaviour["drop"], None)
    policy.has_finite_weights.return_value = behaviour["finite_weights"]
    policy.gradient_norm.return_value = behaviour["gradient"]
    divergence = Divergence(policy)
    assert divergence.find_fault() == "" and not policy.log_probs.called, (
        "there must be no test before the first mini-batch"
    )
    divergence.begin(rollouts, old)
    problem = divergence.find_fault()
    assert fault in problem and bool(problem) == bool(fault)
    assert divergence.find_fault() == problem and policy.log_probs.call_count == 1
    divergence.begin(rollouts, old)
    assert divergence.find_fault() == problem and policy.log_probs.call_count == 2
