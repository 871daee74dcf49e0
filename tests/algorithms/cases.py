"""Mini-batches for the tests of objectives, ordinary and degenerate, and a reference function for every objective."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import torch

from nemo_disco.algorithms import MiniBatch, build_objective

from . import reference as ref
from . import reference_2026 as recent
from . import reference_length as length
from .reference import Case, ExpectedOutput

HINGE = {"kind": "squared_hinge", "beta": 1e3, "delta": 1e-4, "convention": "paper", "estimator": "k1"}
NONE = {"kind": "none", "beta": 0.0, "delta": 0.0, "convention": "paper", "estimator": "k1"}
PENALTIES = {
    "paper": HINGE,
    "k3": HINGE | {"estimator": "k3"},
    "top_k": HINGE | {"estimator": "top_k"},
    "released_code": HINGE | {"convention": "released_code", "delta": 0.01},
    "released_code k3": HINGE | {"convention": "released_code", "delta": 0.01, "estimator": "k3"},
    "kl": NONE | {"kind": "kl_regularization", "beta": 1e-3},
    "kl k3": NONE | {"kind": "kl_regularization", "beta": 0.5, "estimator": "k3"},
    "kl top_k": NONE | {"kind": "kl_regularization", "beta": 0.5, "estimator": "top_k"},
    "dual": NONE | {"kind": "dual", "beta": 2.0, "delta": 1e-3, "estimator": "k3", "beta_min": 0.1, "beta_max": 10.0},
    "none": NONE,
}
RATIO = {"score": "likelihood_ratio"}
TRUNCATED_SAMPLING = {"kind": "truncated_importance_sampling"}
SEQUENCE_MASK = {"kind": "sequence_mask", "cap": 1.03}
OUTLIER_MASK = {"kind": "outlier_mask", "floor": 0.2, "cap": 5.0}

# A variant's name -> (the mapping for build_objective, the reference function).
OBJECTIVES: dict[str, tuple[dict[str, Any], Callable[[Case], ExpectedOutput]]] = {
    "disco": ({"name": "disco"}, ref.disco),
    "disco ratio": ({"name": "disco"} | RATIO, functools.partial(ref.disco, **RATIO)),
    "disco tau": ({"name": "disco", "tau": 0.3}, functools.partial(ref.disco, tau=0.3)),
    "disco_b": ({"name": "disco_b"}, ref.disco_b),
    "disco_b ratio": ({"name": "disco_b"} | RATIO, functools.partial(ref.disco_b, **RATIO)),
    "disco_b clipped": (
        {"name": "disco_b", "clip_low": 0.2, "clip_high": 0.28} | RATIO,
        functools.partial(ref.disco_b_clipped, low=0.2, high=0.28),
    ),
    "disco_b weighted": (
        {"name": "disco_b", "question_weight": True} | RATIO,
        functools.partial(ref.disco_b, question_weight=True, **RATIO),
    ),
    "drpo": ({"name": "drpo", "lambda": 0.2}, functools.partial(ref.drpo, lambda_=0.2)),
    "drpo ratio": ({"name": "drpo"} | RATIO, functools.partial(ref.drpo, **RATIO)),
    "grpo": ({"name": "grpo"}, ref.grpo),
    "grpo reference": ({"name": "grpo", "kl_coefficient": 1e-3}, functools.partial(ref.grpo, kl=1e-3)),
    "grpo reference k2": (
        {"name": "grpo", "kl_coefficient": 0.1, "kl_estimator": "k2"},
        functools.partial(ref.grpo, kl=0.1, estimator="k2"),
    ),
    "grpo reference k3": (
        {"name": "grpo", "kl_coefficient": 0.1, "kl_estimator": "k3"},
        functools.partial(ref.grpo, kl=0.1, estimator="k3"),
    ),
    "grpo clips": (
        {"name": "grpo", "clip_low": 0.1, "clip_high": 0.5},
        functools.partial(ref.grpo, low=0.1, high=0.5),
    ),
    "grpo_er": ({"name": "grpo_er"}, functools.partial(ref.grpo, entropy=1e-3)),
    "grpo_rw": ({"name": "grpo_rw"}, functools.partial(ref.grpo, advantage=ref.grpo_rw_advantage)),
    "dr_grpo": ({"name": "dr_grpo"}, ref.dr_grpo),
    "dapo": ({"name": "dapo"}, ref.dapo),
    "trpa": ({"name": "trpa"}, ref.trpa),
    "gpg": ({"name": "gpg"}, ref.gpg),
    "rloo": ({"name": "rloo"}, functools.partial(ref.grpo, advantage=ref.rloo_advantage)),
    "drpo own": ({"name": "drpo", "preference": "format"}, functools.partial(ref.drpo, custom_preference=True)),
    "rloo_lp": ({"name": "rloo_lp"}, length.rloo_lp),
    "alp": ({"name": "alp"}, length.alp),
    "alp strong": ({"name": "alp", "beta": 0.03}, functools.partial(length.alp, beta=0.03)),
    "hapo": ({"name": "hapo"}, length.hapo),
    "hapo strong": ({"name": "hapo", "length_weight": 1.0}, functools.partial(length.hapo, weight=1.0)),
    "grpo_lead": ({"name": "grpo_lead"}, length.grpo_lead),
    "disco truncated": (
        {"name": "disco", "off_policy": TRUNCATED_SAMPLING},
        functools.partial(length.truncated_importance_sampling, ref.disco),
    ),
    "grpo truncated": (
        {"name": "grpo", "off_policy": TRUNCATED_SAMPLING},
        functools.partial(length.truncated_importance_sampling, ref.grpo),
    ),
    "disco masked": (
        {"name": "disco", "off_policy": SEQUENCE_MASK},
        functools.partial(length.sequence_mask, ref.disco, cap=1.03),
    ),
    "grpo masked": (
        {"name": "grpo", "off_policy": SEQUENCE_MASK},
        functools.partial(length.sequence_mask, ref.grpo, cap=1.03),
    ),
    "grpo weighted responses": (
        {"name": "grpo", "off_policy": {"kind": "sequence_importance_sampling"}},
        functools.partial(recent.sequence_importance_sampling, ref.grpo),
    ),
    "grpo icepop": (
        {"name": "grpo", "off_policy": {"kind": "icepop"}},
        functools.partial(recent.icepop, ref.grpo),
    ),
    "disco without outliers": (
        {"name": "disco", "off_policy": OUTLIER_MASK},
        functools.partial(recent.outlier_mask, ref.disco, floor=0.2, cap=5.0),
    ),
    "gspo": ({"name": "gspo"}, recent.gspo),
    "gspo clips": (
        {"name": "gspo", "clip_low": 0.1, "clip_high": 0.2},
        functools.partial(recent.gspo, low=0.1, high=0.2),
    ),
    "cispo": ({"name": "cispo"}, recent.cispo),
    "cispo clip": ({"name": "cispo", "clip_high": 0.1}, functools.partial(recent.cispo, high=0.1)),
    "sapo": ({"name": "sapo"}, recent.sapo),
    "sapo sharp": (
        {"name": "sapo", "tau_positive": 4.0, "tau_negative": 9.0},
        functools.partial(recent.sapo, positive=4.0, negative=9.0),
    ),
    "dppo": ({"name": "dppo"}, recent.dppo),
    "dppo kl": (
        {"name": "dppo", "divergence": "kl", "divergence_limit": 0.01},
        functools.partial(recent.dppo, divergence="kl", limit=0.01),
    ),
    "divergence_regularized": ({"name": "divergence_regularized"}, recent.divergence_regularized),
    "divergence_regularized tight": (
        {"name": "divergence_regularized", "divergence_limit": 0.05},
        functools.partial(recent.divergence_regularized, limit=0.05),
    ),
    "maxrl": ({"name": "maxrl"}, recent.maxrl),
    "conspo": ({"name": "conspo"}, recent.conspo),
    "conspo sharp": (
        {"name": "conspo", "tau": 0.3, "margin": 0.2, "margin_steps": 60},
        functools.partial(recent.conspo, tau=0.3, margin=0.2, steps=60),
    ),
}
SEPARABLE = [name for name in OBJECTIVES if name.split()[0] not in ("disco", "drpo", "trpa", "gspo", "conspo")]


def make_objective(name: str, penalty: dict[str, Any], **parameters: Any) -> Any:
    """The package's objective of that name in OBJECTIVES, with `penalty` as its constraint and further parameters."""
    return build_objective(OBJECTIVES[name][0] | {"constraint": penalty} | parameters)


def reference_output(name: str, case: Case, penalty: dict[str, Any]) -> ExpectedOutput:
    """The output of the reference function of that name in OBJECTIVES, with `penalty` as its constraint."""
    output = OBJECTIVES[name][1](case)
    output.add_penalty(**penalty)
    return output


def to_mini_batch(case: Case, dtype: torch.dtype = torch.float64) -> MiniBatch:
    """The case as the package's MiniBatch; dtype is that of its per-token tensors."""

    def per_token(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)

    return MiniBatch(
        log_probs=per_token(case.lp),
        old_log_probs=per_token(case.old),
        lengths=torch.tensor(case.lengths),
        question_ids=torch.tensor(case.questions),
        rewards=torch.tensor(case.rewards, dtype=torch.float64),
        max_response_length=case.limit,
        entropies=per_token(case.entropies),
        reference_log_probs=per_token(case.reference),
        generation_log_probs=per_token(case.generation),
        divergences=per_token(case.divergences),
        correct=None if case.correct is None else torch.tensor(case.correct),
        columns={
            "preference": torch.tensor(case.preferences, dtype=torch.float64),
            "shortest_correct": torch.tensor(case.shortest),
            "completed_steps": torch.full((len(case.lengths),), case.step),
        },
    )


def random_case(
    seed: int = 0,
    questions: list[int] | None = None,
    lengths: list[int] | None = None,
    rewards: list[float] | None = None,
    spread: float = 0.3,
    **fields: Any,
) -> Case:
    """A random mini-batch: by default 17 responses of 1 to 9 tokens to up to 5 questions in mixed order, 40% right.

    spread: scale of the log-ratios lp - old. fields: further fields of Case.
    """
    rng = random.Random(seed)
    questions = questions if questions is not None else rng.choices([7, -3, 12, 4, 10**12], k=17)
    n = len(questions)
    lengths = lengths if lengths is not None else [rng.randint(1, 9) for _ in range(n)]
    rewards = rewards if rewards is not None else [float(rng.random() < 0.4) for _ in range(n)]
    old = [-rng.expovariate(0.7) for _ in range(sum(lengths))]
    lp = [x + rng.uniform(-1.3, 0.9) * spread for x in old]
    reference = [x + rng.uniform(-1, 1) * spread for x in old]
    entropies = [rng.uniform(0, 2) for _ in old]
    more = {
        "divergences": [0.5 * (x - o) ** 2 for x, o in zip(lp, old, strict=True)],
        "generation": [x + rng.uniform(-1, 1) * (0.1 if rng.random() < 0.8 else 2.0) for x in old],
        "preferences": [rng.uniform(-1, 1) for _ in lengths],
        "shortest": [q % 4 * 2 for q in questions],
    }
    return Case(lp, old, lengths, questions, rewards, fields.pop("limit", 16), entropies, reference, **(more | fields))


def odd_cases() -> dict[str, Case]:
    """Mini-batches by a description of their peculiarity: ragged or one-sided groups, empty responses, odd rewards."""
    eight = [0, 0, 0, 0, 1, 1, 1, 1]
    return {
        "ragged": random_case(1),
        "ragged again": random_case(2),
        "single responses": random_case(3, questions=[5, 1, 4, 2, 3]),
        "one response": random_case(4, questions=[0]),
        "all correct": random_case(5, questions=eight, rewards=[1.0] * 8),
        "all wrong": random_case(6, questions=eight, rewards=[0.0] * 8),
        "one question mixed": random_case(7, questions=eight, rewards=[1.0] * 5 + [0.0, 1.0, 1.0]),
        "some empty": random_case(
            8, questions=eight, lengths=[0, 3, 1, 4, 0, 2, 0, 0], rewards=[1.0, 0, 1, 0, 0, 0, 1, 1]
        ),
        "the wrong ones empty": random_case(9, questions=[0] * 4, lengths=[2, 0, 0, 3], rewards=[1.0, 0, 0, 1]),
        "all empty": random_case(10, questions=eight, lengths=[0] * 8),
        "extreme ratios": random_case(11, spread=50.0),
        "unmoved": random_case(12, spread=0.0),
        "rewards not 0 or 1": random_case(13, questions=eight, rewards=[0.7, 0.2, -1.5, 3.0, 0.7, 0.7, 0.7, 0.7]),
        "shaped rewards, own verdicts": random_case(
            14, questions=eight, rewards=[0.1, 0.4, -0.2, 0, 0.3, 0.1, 0, 0], correct=[True, True, False, False] * 2
        ),
        "at a threshold of 0": random_case(15, questions=eight, rewards=[0.1, 0, -1, 0.2, 0, -1, 1, 0.5]),
    }
