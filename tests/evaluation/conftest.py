"""Fixtures: evaluations and run directories with invented values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_disco.evaluation.result import EvaluationResult, write_evaluation
from nemo_disco.evaluation.saved_tokens import pack_values, pack_widths
from nemo_disco.runtime.rundir import RunDirectory


@pytest.fixture
def make_result() -> Callable[..., EvaluationResult]:
    """A function that makes a result with random verdicts and lengths; `accuracy` is the mean over the questions."""

    def make(accuracy: float = 0.4, step: int = 0, name: str = "arithmetic", questions: int = 64) -> EvaluationResult:
        rng = np.random.default_rng(7)
        chance = np.clip(accuracy + 0.2 * rng.normal(size=questions), 0, 1)
        correct = rng.random((questions, 8)) < chance[:, None]
        lengths = rng.integers(20, 80, size=correct.shape)
        return EvaluationResult(name, step, correct, lengths, lengths > 75, chance > 0.5)

    return make


def make_metrics_line(step: int) -> dict[str, Any]:
    phases = {"generate": 1.0, "grade": 0.1, "log_probs": 0.2, "train": 0.9, "refit": 0.0}
    return {
        "step": step,
        "reward/mean": 0.3 + 0.005 * step,
        "policy/kl": 1e-4 * step,
        "policy/kl_stderr": 1e-4,
        "constraint/active": 1.0 if step > 30 else 0.0,
        "policy/entropy": 0.5,
        "response/length_mean": 40.0,
        "groups/mixed": 0.7,
        "grad_norm": None if step == 3 else 0.8,
        "optimizer/lr": 1e-4,
        **{f"time/{name}": seconds for name, seconds in phases.items()},
        "time/step": 2.4,
    }


def make_constraint_metrics(step: int) -> dict[str, Any]:
    """The metrics that a run has since the constraint has estimators; step 2 has none of the KL after it."""
    return {
        "policy/kl_after": None if step == 2 else 2e-4 * step,
        "policy/kl_k3": 1.1e-4 * step,
        "policy/kl_k3_stderr": 1e-5,
        "constraint/kl": 1.1e-4 * step,
        "constraint/kl_after_over_delta": None if step == 2 else 2e-4 * step / 3e-3,
        "constraint/by_mini_batch": [{"kl": 0.0, "k1": 0.0}, {"kl": 1.1e-4 * step, "k1": None}],
        "mismatch/worst_tokens": [{"response": 1, "trainer": -0.5}],
        "grad_norm/clipped": 0.5,
        "dro/effective_sample": 0.999,
        "groups/all_wrong": 0.2,
        "groups/all_right": 0.1,
        "groups/never_solved": 0.15,
        "groups/pass@2": 0.6,
    }


def make_rollout(step: int, question: int, sample: int) -> dict[str, Any]:
    right = sample % 2 == 0
    return {
        "question": f"What is {question} + {step}?",
        "prompt": f"<|im_start|>user\nWhat is {question} + {step}?<|im_end|>",
        "response": f"<b>bold</b> &amp; </script> sample {sample}\n</think>\\boxed{{{question + step}}}",
        "answer": str(question + step),
        "reward": float(right),
        "correct": right,
        "length": 12 + sample,
        "truncated": sample == 3,
        "question_id": question,
    }


def add_token_values(row: dict[str, Any]) -> dict[str, Any]:
    """A copy of the row with token values: tokens of five characters and an EOS, one weight, log-ratios 0.4 to -0.4."""
    text = row["response"]
    widths = [len(text[at : at + 5]) for at in range(0, len(text), 5)] + [0]
    ratios = np.linspace(0.4, -0.4, len(widths))
    weight = 1.5 if row["correct"] else -0.5
    values = {"weight": pack_values([weight] * len(widths)), "log_ratio": pack_values(ratios)}
    return row | values | {"token_widths": pack_widths(widths)}


@pytest.fixture
def make_run(tmp_path: Path, make_result: Callable[..., EvaluationResult]) -> Callable[..., Path]:
    """A function that writes a run directory; only the setting `lr` differs between its runs.

    tokens: with token values in the rollouts; estimators: with make_constraint_metrics.
    """

    def make(
        name: str = "run",
        steps: int = 40,
        lr: float = 1e-4,
        questions: int = 3,
        samples: int = 4,
        tokens: bool = False,
        estimators: bool = False,
    ) -> Path:
        run = RunDirectory(tmp_path / name)
        run.create()
        run.config.write_text(
            f"seed: 1\nmodel:\n  optim: {{lr: {lr}, betas: [0.9, 0.95]}}\nalgorithm:\n  constraint: {{delta: 3e-3}}\n"
        )
        lines = [make_metrics_line(s) | (make_constraint_metrics(s) if estimators else {}) for s in range(1, steps + 1)]
        run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        for step, accuracy in ((0, 0.35), (steps, 0.85)):
            write_evaluation(run.evaluation, make_result(accuracy, step))
        for step in range(1, steps + 1):
            rows = [make_rollout(step, q, i) for q in range(questions) for i in range(samples)]
            rows = [add_token_values(row) for row in rows] if tokens else rows
            run.rollout_file(step).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return run.path

    return make
