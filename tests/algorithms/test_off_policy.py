"""Off-policy corrections by the response and by the token's ratio, and an engine's log-probs that are not finite."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from nemo_disco.algorithms import MiniBatch, build_objective
from nemo_disco.runtime.errors import UserError

from .cases import random_case, to_mini_batch
from .reference import Case

KINDS = (
    "truncated_importance_sampling",
    "sequence_importance_sampling",
    "icepop",
    "sequence_mask",
    "outlier_mask",
)


@pytest.fixture
def pair() -> Case:
    """Two responses of two tokens to a question, one right and one wrong, that the policy has not moved from."""
    return random_case(81, questions=[0, 0], lengths=[2, 2], rewards=[1.0, 0.0], spread=0.0)


def factors(case: Case, ratios: list[float], **settings: Any) -> list[float]:
    """The factor of each token's gradient where these are the ratios of the trainer's probabilities to the engine's."""
    case = replace(case, generation=[old - math.log(r) for old, r in zip(case.old, ratios, strict=True)])
    plain, corrected = (
        build_objective({"name": "grpo"} | more)(to_mini_batch(case)).token_weights
        for more in ({}, {"off_policy": settings})
    )
    return (corrected / plain).tolist()


def test_a_response_is_weighted_by_the_product_of_its_ratios(pair: Case) -> None:
    kind = {"kind": "sequence_importance_sampling"}
    assert factors(pair, [1.2, 1.5, 0.5, 0.5], **kind) == pytest.approx([1.8, 1.8, 0.25, 0.25])
    assert factors(pair, [2.0, 1.5, 0.5, 0.5], **kind) == pytest.approx([2.0, 2.0, 0.25, 0.25])
    assert factors(pair, [2.0, 1.5, 0.5, 0.5], cap=10, **kind) == pytest.approx([3.0, 3.0, 0.25, 0.25])
    assert factors(pair, [1e200, 1e200, 1e-200, 1e-200], **kind) == pytest.approx([2.0, 2.0, 0.0, 0.0])


def test_icepop_drops_the_tokens_that_disagree_and_weights_the_others(pair: Case) -> None:
    assert factors(pair, [0.51, 0.49, 4.9, 5.1], kind="icepop") == pytest.approx([0.51, 0.0, 4.9, 0.0])
    assert factors(pair, [0.51, 0.49, 4.9, 5.1], kind="icepop", floor=0.4, cap=2) == pytest.approx([0.51, 0.49, 0, 0])


def test_one_outlier_masks_its_response(pair: Case) -> None:
    assert factors(pair, [1.0, 1.1e-4, 1.0, 0.9e-4], kind="outlier_mask") == [1, 1, 0, 0]
    assert factors(pair, [99.0, 1.0, 101.0, 1.0], kind="outlier_mask") == [1, 1, 0, 0]
    assert factors(pair, [1.0, 0.6, 0.4, 1.0], kind="outlier_mask", floor=0.5) == [1, 1, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_where_engine_and_trainer_agree_nothing_is_corrected(kind: str, pair: Case) -> None:
    batch = to_mini_batch(replace(pair, generation=pair.old))
    output = build_objective({"name": "gspo", "off_policy": {"kind": kind}})(batch)
    assert output.token_weights.equal(build_objective({"name": "gspo"})(batch).token_weights)
    assert output.metrics["off_policy/factor_mean"] == 1 and output.metrics["off_policy/cut"] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [-math.inf, math.inf, math.nan])
def test_an_engines_log_prob_that_is_not_finite_is_refused_where_it_is_read(kind: str, bad: float, pair: Case) -> None:
    case = replace(pair, generation=[*pair.old[:3], bad])
    message = (
        rf"off_policy.kind={kind} needs finite log-probs .* token 3 \(number 1 of response 1, question 0\) is {bad}; .*"
        r"generation.top_p=1.0 and generation.top_k=0, or algorithm.off_policy.kind=none"
    )
    objective = build_objective({"name": "grpo", "off_policy": {"kind": kind}})
    for use in (objective, objective.token_loss):
        with pytest.raises(UserError, match=message) as error:
            use(to_mini_batch(case))
        assert "\n" not in str(error.value)
    uncorrected = build_objective({"name": "grpo"})
    expected = uncorrected(to_mini_batch(replace(case, generation=case.old))).token_weights
    assert uncorrected(to_mini_batch(case)).token_weights.equal(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kind": "sequence_mask", "floor": 0.5},
            "off_policy.floor is a limit of icepop and outlier_mask; .* is sequence",
        ),
        ({"kind": "icepop", "floor": 5}, "off_policy.floor must be below cap; they are 5 and 5"),
        ({"kind": "icepop", "cap": 0.4}, "off_policy.floor must be below cap; they are 0.5 and 0.4"),
        ({"kind": "icepop", "floor": -1}, "off_policy.floor must be at least 0"),
        ({"kind": "ice_pop"}, "off_policy.kind must be one of: icepop, "),
    ],
)
def test_limits_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_objective({"name": "grpo", "off_policy": settings})


def test_empty_responses_have_no_outlier() -> None:
    batch = MiniBatch(
        torch.zeros(1),
        torch.zeros(1),
        torch.tensor([0, 1, 0]),
        torch.tensor([0, 0, 0]),
        torch.tensor([1.0, 0.0, 0.0]),
        4,
        generation_log_probs=torch.tensor([-9.0]),
    )
    for kind in KINDS:
        output = build_objective({"name": "grpo", "off_policy": {"kind": kind}})(batch)
        assert output.token_weights.isfinite().all()
