"""The metrics of a step, from its rollouts and mini-batches, under the names of metrics.jsonl. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from nemo_disco.algorithms.mismatch import mismatch, worst_tokens
from nemo_disco.algorithms.step import OldValues
from nemo_disco.data.rollouts import Rollouts

# Names in every line of metrics.jsonl whose values come from mini-batches that were applied.
MINI_BATCH_METRICS = (
    *("objective/value", "policy/kl", "policy/kl_k3", "policy/kl_stderr"),
    *("constraint/active", "constraint/penalty", "grad_norm", "lr", "policy/noise_floor"),
)


def summarize_step(
    rollouts: Rollouts, old: OldValues, history: Sequence[dict[str, float]], *, step: int, skipped: int
) -> dict[str, Any]:
    """A step's metrics: numbers, and the tokens on which engine and trainer differ most.

    history: of each mini-batch that was applied. KL is the last one's, whose policy is farthest from the one that
    sampled; constraint/active is the share of mini-batches; the rest are means over mini-batches. step: steps before
    this one; skipped: mini-batches of the run that were not applied.
    """
    if not history:  # every mini-batch was skipped: the names stay, without a number
        history = [dict.fromkeys(MINI_BATCH_METRICS, float("nan"))]
    names = {name for metrics in history for name in metrics}
    metrics = {name: float(np.mean([m[name] for m in history if name in m])) for name in sorted(names)}
    metrics |= {name: value for name, value in history[-1].items() if name.startswith("policy/kl")}
    assert old.entropies is not None
    staleness = step - rollouts.weight_versions
    ids, correct = rollouts.question_ids.numpy(), rollouts.correct.numpy()
    mixed = np.intersect1d(ids[correct], ids[~correct]).size / len(np.unique(ids))
    return metrics | {
        "reward/mean": float(rollouts.rewards.mean()),
        "reward/correct": float(correct.mean()),
        "response/length_mean": float(rollouts.response_lengths.double().mean()),
        "response/limit": rollouts.max_response_length,
        "response/truncated": float(rollouts.truncated.double().mean()),
        "policy/entropy": float(old.entropies.mean()) if len(old.entropies) else 0.0,
        "groups/mixed": float(mixed),
        "tokens": int(rollouts.total_lengths.sum()),
        "mini_batches/skipped": skipped,
        "staleness/mean": float(staleness.double().mean()),
        "staleness/max": int(staleness.max()),
        **mismatch(old.log_probs, rollouts.generation_log_probs),
        "mismatch/worst_tokens": [asdict(token) for token in worst_tokens(old.log_probs, rollouts)],
    }
