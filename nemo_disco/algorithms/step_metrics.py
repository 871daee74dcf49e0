"""The metrics of a step, from its rollouts and mini-batches, under the names of metrics.jsonl. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from nemo_disco.algorithms.mismatch import mismatch, worst_tokens
from nemo_disco.algorithms.step import OldValues
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.evaluation.statistics import pass_chance

# Names in every line of metrics.jsonl whose values come from mini-batches that were applied.
MINI_BATCH_METRICS = (
    *("objective/value", "policy/kl", "policy/kl_stderr", "policy/kl_k3", "policy/kl_k3_stderr"),
    *("constraint/kl", "constraint/active", "constraint/penalty"),
    *("grad_norm", "grad_norm/clipped", "lr", "policy/noise_floor"),
)
# Of the last mini-batch, whose policy is farthest from the one that sampled.
_LAST = ("policy/kl", "constraint/kl")
# The constraint's measurements of each mini-batch: metric -> its name in "constraint/by_mini_batch".
_BY_MINI_BATCH = {
    "constraint/kl": "kl",
    "constraint/kl_over_delta": "kl_over_delta",
    "policy/kl": "k1",
    "policy/kl_stderr": "k1_stderr",
    "policy/kl_k3": "k3",
    "policy/kl_k3_stderr": "k3_stderr",
}


def summarize_step(
    rollouts: Rollouts, old: OldValues, history: Sequence[dict[str, float]], *, step: int, skipped: int
) -> dict[str, Any]:
    """A step's metrics: numbers, and the tokens on which engine and trainer differ most.

    history: of each mini-batch that was applied. KL is the last one's; constraint/active and grad_norm/clipped are
    shares of mini-batches; the rest are means over mini-batches. step: steps before this one; skipped: mini-batches of
    the run that were not applied.
    """
    if not history:  # every mini-batch was skipped: the names stay, without a number
        history = [dict.fromkeys(MINI_BATCH_METRICS, float("nan"))]
    names = {name for metrics in history for name in metrics}
    metrics = {name: float(np.mean([m[name] for m in history if name in m])) for name in sorted(names)}
    metrics |= {name: value for name, value in history[-1].items() if name.startswith(_LAST)}
    metrics |= {} if old.routes is None else {"experts/changed": metrics.get("experts/changed", float("nan"))}
    assert old.entropies is not None
    staleness = step - rollouts.weight_versions
    return metrics | {
        "reward/mean": float(rollouts.rewards.mean()),
        "reward/correct": float(rollouts.correct.double().mean()),
        "response/length_mean": float(rollouts.response_lengths.double().mean()),
        "response/limit": rollouts.max_response_length,
        "response/truncated": float(rollouts.truncated.double().mean()),
        "policy/entropy": float(old.entropies.mean()) if len(old.entropies) else 0.0,
        **group_metrics(rollouts),
        "constraint/by_mini_batch": [
            {short: m[name] for name, short in _BY_MINI_BATCH.items() if name in m} for m in history
        ],
        "tokens": int(rollouts.total_lengths.sum()),
        "mini_batches/skipped": skipped,
        "staleness/mean": float(staleness.double().mean()),
        "staleness/max": int(staleness.max()),
        **mismatch(old.log_probs, rollouts.generation_log_probs),
        "mismatch/worst_tokens": [asdict(token) for token in worst_tokens(old.log_probs, rollouts)],
    }


def group_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Shares of a step's questions by the verdicts on their responses, and pass@k for powers of two k up to the largest
    group (arXiv 2107.03374, equation 1): over the questions with k responses or more."""
    _, row = np.unique(rollouts.question_ids.numpy(), return_inverse=True)
    size, right = np.bincount(row), np.bincount(row, weights=rollouts.correct.numpy()).astype(int)
    metrics = {
        "groups/mixed": float(np.mean((right > 0) & (right < size))),
        "groups/all_wrong": float(np.mean(right == 0)),
        "groups/all_right": float(np.mean(right == size)),
    }
    k = 2
    while k <= size.max():
        shares = [pass_chance(n, c, k) for n, c in zip(size.tolist(), right.tolist(), strict=True) if n >= k]
        metrics[f"groups/pass@{k}"] = float(np.mean(shares))
        k *= 2
    return metrics
