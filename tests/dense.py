"""Comparison of a policy with transformers' model, whose gradient torch's autograd computes, in float64."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import by_file_name, load_transformers_model, transformers_log_probs

from nemo_disco.data.rollouts import Rollouts
from nemo_disco.policy.policy import Policy


def assert_as_dense_autograd(policy: Policy, directory: Path, rollouts: Rollouts) -> None:
    """Log-probs, and the whole gradient of a random sum of them, are those of transformers' model in the directory."""
    model = load_transformers_model(directory)
    expected = transformers_log_probs(model, rollouts, policy.temperature)
    # rope's angles are float32 in both, and here the cosines are applied in another order
    torch.testing.assert_close(policy.log_probs(rollouts)[0], expected.detach(), rtol=0, atol=1e-9)
    weights = torch.randn(len(expected), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (expected @ weights).backward()
    policy.accumulate(rollouts, lambda index, values: weights[index] * values.log_probs, everywhere=True)
    gradients = dict(policy.named_gradients())
    dense = by_file_name({name: p.grad for name, p in model.named_parameters()}, model.config.model_type)
    assert gradients.keys() == dense.keys()
    for name, gradient in dense.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-9)
