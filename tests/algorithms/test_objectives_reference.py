"""Every objective's loss and weights against an independent float64 reference, over mini-batches that break peers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .cases import HINGE, NONE, OBJECTIVES, PENALTIES, batch_of, expected, objective, odd_cases, random_case
from .reference import Answer, Case

CASES = odd_cases()
PER_TOKEN = ("log_probs", "old_log_probs", "entropies", "reference_log_probs", "generation_log_probs")
PER_RESPONSE = ("lengths", "question_ids", "rewards")


def assert_agrees(output: object, answer: Answer, tolerance: float = 1e-9) -> None:
    assert output.loss.dtype == output.token_weights.dtype == torch.float64
    assert output.loss.ndim == 0
    wanted = torch.tensor(answer.lp, dtype=torch.float64)
    scale = float(wanted.abs().max()) if len(wanted) else 0.0
    torch.testing.assert_close(output.token_weights, wanted, rtol=tolerance, atol=tolerance * 1e-3 * scale)
    assert float(output.loss) == pytest.approx(answer.loss, rel=tolerance, abs=tolerance * max(1, abs(answer.value)))
    assert output.metrics["objective/value"] == pytest.approx(answer.value, rel=tolerance, abs=tolerance)
    assert output.metrics["policy/kl"] == pytest.approx(answer.kl, rel=tolerance, abs=1e-12)
    if output.entropy_weights is not None:
        wanted = torch.tensor(answer.entropies, dtype=torch.float64)
        torch.testing.assert_close(output.entropy_weights, wanted, rtol=tolerance, atol=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_its_reference(name: str, case: str) -> None:
    output = objective(name, HINGE)(batch_of(CASES[case]))
    assert_agrees(output, expected(name, CASES[case], HINGE))
    assert (output.entropy_weights is not None) == (name == "grpo_er")


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_penalty_joins_every_objective(name: str, penalty: str) -> None:
    case = random_case(21, spread=0.4)
    output = objective(name, PENALTIES[penalty])(batch_of(case))
    answer = expected(name, case, PENALTIES[penalty])
    assert answer.kl > 0.01, "the hinge is meant to be active here"
    assert_agrees(output, answer)
    assert output.metrics["constraint/active"] == float(penalty != "none")
    assert output.metrics["constraint/penalty"] == pytest.approx(answer.loss + answer.value, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_float32_input_is_computed_in_float64(name: str) -> None:
    case = random_case(22)
    output = objective(name, HINGE)(batch_of(case, torch.float32))
    assert_agrees(output, expected(name, case, HINGE), tolerance=1e-5)

    def rounded(values: list[float]) -> list[float]:
        return torch.tensor(values, dtype=torch.float32).tolist()

    same_input = replace(
        case,
        lp=rounded(case.lp),
        old=rounded(case.old),
        entropies=rounded(case.entropies),
        reference=rounded(case.reference),
        generation=rounded(case.generation),
    )
    assert_agrees(output, expected(name, same_input, HINGE))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_threshold_splits_the_rewards(name: str) -> None:
    case = replace(CASES["at a threshold of 0"], threshold=0.0)
    assert_agrees(objective(name, NONE, threshold=0.0)(batch_of(case)), expected(name, case, NONE))


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    n = draw(st.integers(1, 10))
    questions = draw(st.lists(st.integers(-2, 2), min_size=n, max_size=n))
    lengths = draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
    rewards = draw(st.lists(st.sampled_from([0.0, 1.0, 0.3, 0.5, -2.0, 7.0]), min_size=n, max_size=n))
    correct = draw(st.none() | st.lists(st.booleans(), min_size=n, max_size=n))
    total = sum(lengths)

    def tokens(low: float, high: float) -> list[float]:
        return draw(st.lists(st.floats(low, high), min_size=total, max_size=total))

    old = tokens(-60, 0)
    lp = [o + d for o, d in zip(old, tokens(-30, 30), strict=True)]
    limit = draw(st.integers(4, 20))
    more = {
        "generation": [o + d for o, d in zip(old, tokens(-1, 1), strict=True)],
        "preferences": draw(st.lists(st.floats(-1, 1), min_size=n, max_size=n)),
        "shortest": draw(st.lists(st.integers(0, 5), min_size=n, max_size=n)),
    }
    return Case(lp, old, lengths, questions, rewards, limit, tokens(0, 5), tokens(-60, 0), correct, **more)


@settings(max_examples=60, deadline=None)
@given(case=any_case(), name=st.sampled_from(sorted(OBJECTIVES)), penalty=st.sampled_from(sorted(PENALTIES)))
def test_any_mini_batch_is_its_reference(case: Case, name: str, penalty: str) -> None:
    assert_agrees(objective(name, PENALTIES[penalty])(batch_of(case)), expected(name, case, PENALTIES[penalty]))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_order_of_responses_does_not_matter(name: str) -> None:
    case = random_case(23)
    batch = batch_of(case)
    order = torch.randperm(len(case.lengths), generator=torch.Generator().manual_seed(0)).tolist()
    where = torch.tensor([t for i in order for t in case.tokens(i)])
    per_token = {f: getattr(batch, f)[where] for f in PER_TOKEN}
    per_response = {f: getattr(batch, f)[order] for f in PER_RESPONSE}
    one = objective(name, HINGE)(batch)
    columns = {name: values[order] for name, values in batch.columns.items()}
    other = objective(name, HINGE)(replace(batch, **per_token, **per_response, columns=columns))
    torch.testing.assert_close(other.token_weights, one.token_weights[where], rtol=1e-12, atol=1e-13)
    assert other.metrics == pytest.approx(one.metrics, rel=1e-12)


def test_the_metrics_of_kl_say_their_noise() -> None:
    case = random_case(24)
    metrics = objective("disco", HINGE)(batch_of(case)).metrics
    moves = [o - x for o, x in zip(case.old, case.lp, strict=True)]
    mean = sum(moves) / len(moves)
    std = math.sqrt(sum((m - mean) ** 2 for m in moves) / (len(moves) - 1))
    assert metrics["policy/kl_stderr"] == pytest.approx(std / math.sqrt(len(moves)), rel=1e-9)
    assert metrics["policy/kl_k3"] == pytest.approx(sum(math.exp(-m) - 1 + m for m in moves) / len(moves), rel=1e-9)
    assert metrics["policy/entropy"] == pytest.approx(sum(case.entropies) / len(moves), rel=1e-9)
    mixed = [{case.right(i) for i in case.group(q)} == {True, False} for q in set(case.questions)]
    assert metrics["groups/mixed"] == pytest.approx(sum(mixed) / len(mixed))
