"""Noise of the constraint's estimators: of KL_hat's value, and of its gradient.

    OMP_NUM_THREADS=1 python -m benchmarks.study.fact_chain.noise [--output FILE.json]

A policy of the fact-chain arm is moved along the direction of a few DisCO updates to a given KL. Mini-batches of about
1,600 tokens, sampled by the old policy, then estimate that KL. Printed are the standard deviation of the value, the
mean cosine of the gradient with the true one (that of the exact KL over all mini-batches' tokens), and its norm over
the true one's.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_disco.algorithms import build_objective
from nemo_disco.algorithms.objectives.constraint import SQUARED_HINGE, Constraint

from . import runs
from .policy import FactPolicy, sample, warm_start
from .task import Questions, draw_sets
from .training import Settings, Tokens, Training, compute_divergences, pack

ESTIMATORS = {
    "k1": {"estimator": "k1"},
    "k3": {"estimator": "k3"},
    "top 4": {"estimator": "top_k", "top_k": 4},
    "exact": {"estimator": "top_k", "top_k": 64},
}
QUESTIONS, EACH, MINI_BATCHES = 44, 8, 40  # 44 questions of 4.5 terms: about 1,600 tokens
TARGETS = (1e-4, 1e-3)


def estimate(constraint: Constraint, policy: FactPolicy, old: Tensor, tokens: Tokens) -> tuple[float, Tensor]:
    """KL_hat of a mini-batch and its gradient with respect to all weights, as one vector."""
    old_rows, rows = old[tokens.symbols, tokens.terms], policy(tokens.symbols, tokens.terms)
    log_probs, old_log_probs = (x.gather(-1, tokens.next[:, None])[:, 0] for x in (rows, old_rows))
    likely = constraint.likely_tokens
    divergences = compute_divergences(old_rows, rows, likely) if likely else None
    kl = constraint.token_terms(log_probs, old_log_probs, divergences).mean()
    gradients = torch.autograd.grad(kl, list(policy.parameters()))
    return float(kl.detach()), torch.cat([g.flatten() for g in gradients])


def move(start: FactPolicy, questions: Questions, target: float) -> FactPolicy:
    """The policy along the line from `start` through four DisCO steps whose KL(start || policy) is the target."""
    grid = runs.load_grid()
    settings = Settings(**{**grid["training"], "steps": 4})
    training = Training(start, build_objective({"name": "disco"}), 1e-3, questions, settings, seed=1)
    training.run()
    old, low, high = start.table(), 0.0, 1.0
    for _ in range(40):  # KL grows with the distance
        middle = (low + high) / 2
        policy = copy.deepcopy(start)
        with torch.no_grad():
            for p, end in zip(policy.parameters(), training.policy.parameters(), strict=True):
                p += middle * (end - p)
        tokens = draw(start, questions, 0)
        place = (tokens.symbols, tokens.terms)
        kl = float((old.exp() * (old - policy.table())).sum(-1)[place].mean())
        low, high = (middle, high) if kl < target else (low, middle)
    return policy


def draw(start: FactPolicy, questions: Questions, seed: int) -> Tokens:
    """The tokens of responses that the old policy samples to these questions."""
    return pack(sample(start.table(), questions, EACH, torch.Generator().manual_seed(seed)), questions, EACH)


def measure(target: float) -> dict[str, Any]:
    """Figures of each estimator at one KL."""
    questions = draw_sets((QUESTIONS * MINI_BATCHES,))[0]
    start = warm_start(1, **runs.load_grid()["start"])
    policy, old = move(start, questions, target), start.table()
    parts = torch.split(torch.arange(len(questions)), QUESTIONS)
    batches = [draw(start, questions.select(part), seed) for seed, part in enumerate(parts, 1)]
    exact = Constraint(kind=SQUARED_HINGE, **ESTIMATORS["exact"])
    true = torch.stack([estimate(exact, policy, old, tokens)[1] for tokens in batches]).mean(0)
    figures: dict[str, Any] = {"kl": target, "tokens": sum(len(t.next) for t in batches) / len(batches)}
    for name, settings in ESTIMATORS.items():
        values, gradients = zip(
            *(estimate(Constraint(kind=SQUARED_HINGE, **settings), policy, old, tokens) for tokens in batches),
            strict=True,
        )
        cosines = [float(torch.cosine_similarity(g, true, dim=0)) for g in gradients]
        figures[name] = {
            "mean": float(torch.tensor(values).mean()),
            "standard_deviation": float(torch.tensor(values).std()),
            "cosine": sum(cosines) / len(cosines),
            "norm": sum(float(g.norm() / true.norm()) for g in gradients) / len(gradients),
        }
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures to this file too, as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = [measure(target) for target in TARGETS]
    for figures in results:
        print(f"KL {figures['kl']:g}, mini-batches of {figures['tokens']:.0f} tokens")
        print(f"{'':8}{'mean':>10}{'sd':>10}{'cosine':>9}{'norm':>7}")
        for name in ESTIMATORS:
            row = figures[name]
            print(f"{name:8}{row['mean']:10.2e}{row['standard_deviation']:10.1e}{row['cosine']:9.2f}{row['norm']:7.1f}")
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
