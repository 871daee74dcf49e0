"""How far the rollout engine's log-probs are from the training engine's, for the same tokens. Pure."""

from __future__ import annotations

import torch
from torch import Tensor


def mismatch(old_log_probs: Tensor, generation_log_probs: Tensor) -> dict[str, float]:
    """From delta = old - generation, [T] each: its size, and two estimates of KL(rollout engine || training engine).

    The former sampled the tokens, so k1 = mean(-delta) may be negative and k3 = mean(exp(delta) - 1 - delta) may not.
    Without tokens all are those of two engines that agree.
    """
    delta = old_log_probs.cpu().double() - generation_log_probs.cpu().double()
    if not len(delta):
        delta = torch.zeros(1, dtype=torch.float64)
    return {
        "mismatch/mean_abs": float(delta.abs().mean()),
        "mismatch/max_abs": float(delta.abs().max()),
        "mismatch/mean_exp_abs": float(delta.abs().exp().mean()),
        "mismatch/kl_k1": float(-delta.mean()),
        "mismatch/kl_k3": float((delta.expm1() - delta).mean()),
    }
