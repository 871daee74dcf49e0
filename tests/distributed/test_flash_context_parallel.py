"""The flash path of attention under context parallelism gives the log-probs and gradient of SDPA on one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flash
import pytest
import torch
from tiny_models import model_config, random_rollouts, save_model

from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy


def compute_log_probs_and_gradients(
    path: Path, context_size: int, use_flash: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs [T] of random rollouts, and the gradients of their sum by parameter."""
    with pytest.MonkeyPatch.context() as patch:
        if use_flash:
            flash.install_stand_in(patch)
        config = model_config(path, context_parallel_size=context_size)
        parallel.start(config)
        policy, rollouts = Policy(config, dtype=torch.float64), random_rollouts()
        log_probs, _ = policy.log_probs(rollouts)
        policy.accumulate(rollouts, lambda _, values: values.log_probs, everywhere=True)
        return log_probs, {name: g.clone() for name, g in policy.named_gradients()}


def test_flash_equals_sdpa_across_ranks(tmp_path: Path, run_on_ranks: Callable[..., list[Any]]) -> None:
    path = save_model(tmp_path / "model", "qwen2", tied=True)
    expected, gradients = compute_log_probs_and_gradients(path, 1, False)
    for log_probs, rank_gradients in run_on_ranks(2, compute_log_probs_and_gradients, path, 2, True):
        torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-12)
        for name, gradient in gradients.items():
            torch.testing.assert_close(rank_gradients[name], gradient, rtol=1e-10, atol=1e-12)
