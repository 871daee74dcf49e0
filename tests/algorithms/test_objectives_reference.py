"""Every objective's loss and token weights equal those of the float64 reference, also on degenerate mini-batches."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .cases import (
    HINGE,
    NONE,
    OBJECTIVES,
    PENALTIES,
    make_objective,
    odd_cases,
    random_case,
    reference_output,
    to_mini_batch,
)
from .reference import Case, ExpectedOutput

CASES = odd_cases()
PER_TOKEN = ("log_probs", "old_log_probs", "entropies", "reference_log_probs", "generation_log_probs")
PER_RESPONSE = ("lengths", "question_ids", "rewards")


def assert_agrees(output: object, expected: ExpectedOutput, tolerance: float = 1e-9) -> None:
    """Check every figure of an ObjectiveOutput against the reference, to the relative tolerance."""
    assert output.loss.dtype == output.token_weights.dtype == torch.float64
    assert output.loss.ndim == 0
    gradient = torch.tensor(expected.token_gradient, dtype=torch.float64)
    scale = float(gradient.abs().max()) if len(gradient) else 0.0
    torch.testing.assert_close(output.token_weights, gradient, rtol=tolerance, atol=tolerance * 1e-3 * scale)
    assert float(output.loss) == pytest.approx(
        expected.loss, rel=tolerance, abs=tolerance * max(1, abs(expected.value))
    )
    assert output.metrics["objective/value"] == pytest.approx(expected.value, rel=tolerance, abs=tolerance)
    assert output.metrics["policy/kl"] == pytest.approx(expected.k1, rel=tolerance, abs=1e-12)
    assert output.metrics["constraint/kl"] == pytest.approx(expected.kl, rel=tolerance, abs=1e-12)
    if output.entropy_weights is not None:
        gradient = torch.tensor(expected.entropy_gradient, dtype=torch.float64)
        torch.testing.assert_close(output.entropy_weights, gradient, rtol=tolerance, atol=0)
    gradient = torch.tensor(expected.divergence_gradient, dtype=torch.float64)
    if output.divergence_weights is None:
        assert not gradient.any()
    else:
        torch.testing.assert_close(output.divergence_weights, gradient, rtol=tolerance, atol=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_its_reference(name: str, case: str) -> None:
    output = make_objective(name, HINGE)(to_mini_batch(CASES[case]))
    assert_agrees(output, reference_output(name, CASES[case], HINGE))
    assert (output.entropy_weights is not None) == (name == "grpo_er")


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_penalty_joins_every_objective(name: str, penalty: str) -> None:
    case = random_case(21, spread=0.4)
    output = make_objective(name, PENALTIES[penalty])(to_mini_batch(case))
    expected = reference_output(name, case, PENALTIES[penalty])
    assert expected.kl > 0.01, "KL_hat must be above delta, or the hinge is not active and goes untested"
    assert_agrees(output, expected)
    assert output.metrics["constraint/active"] == float(penalty != "none")
    assert output.metrics["constraint/penalty"] == pytest.approx(expected.loss + expected.value, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_float32_input_is_computed_in_float64(name: str) -> None:
    case = random_case(22)
    output = make_objective(name, HINGE)(to_mini_batch(case, torch.float32))
    assert_agrees(output, reference_output(name, case, HINGE), tolerance=1e-5)

    def round_to_float32(values: list[float]) -> list[float]:
        return torch.tensor(values, dtype=torch.float32).tolist()

    same_input = replace(
        case,
        lp=round_to_float32(case.lp),
        old=round_to_float32(case.old),
        entropies=round_to_float32(case.entropies),
        reference=round_to_float32(case.reference),
        generation=round_to_float32(case.generation),
        divergences=round_to_float32(case.divergences),
    )
    assert_agrees(output, reference_output(name, same_input, HINGE))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_threshold_splits_the_rewards(name: str) -> None:
    case = replace(CASES["at a threshold of 0"], threshold=0.0)
    output = make_objective(name, NONE, threshold=0.0)(to_mini_batch(case))
    assert_agrees(output, reference_output(name, case, NONE))


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    """Strategy of small mini-batches: any mixture of groups, empty responses, rewards, verdicts and log-ratios."""
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
        "divergences": tokens(0, 3),
        "preferences": draw(st.lists(st.floats(-1, 1), min_size=n, max_size=n)),
        "shortest": draw(st.lists(st.integers(0, 5), min_size=n, max_size=n)),
    }
    return Case(lp, old, lengths, questions, rewards, limit, tokens(0, 5), tokens(-60, 0), correct, **more)


@settings(max_examples=60, deadline=None)
@given(case=any_case(), name=st.sampled_from(sorted(OBJECTIVES)), penalty=st.sampled_from(sorted(PENALTIES)))
def test_any_mini_batch_is_its_reference(case: Case, name: str, penalty: str) -> None:
    output = make_objective(name, PENALTIES[penalty])(to_mini_batch(case))
    assert_agrees(output, reference_output(name, case, PENALTIES[penalty]))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_order_of_responses_does_not_matter(name: str) -> None:
    case = random_case(23)
    batch = to_mini_batch(case)
    order = torch.randperm(len(case.lengths), generator=torch.Generator().manual_seed(0)).tolist()
    token_order = torch.tensor([t for i in order for t in case.tokens(i)])
    per_token = {f: getattr(batch, f)[token_order] for f in PER_TOKEN}
    per_response = {f: getattr(batch, f)[order] for f in PER_RESPONSE}
    original = make_objective(name, HINGE)(batch)
    columns = {name: values[order] for name, values in batch.columns.items()}
    permuted = make_objective(name, HINGE)(replace(batch, **per_token, **per_response, columns=columns))
    torch.testing.assert_close(permuted.token_weights, original.token_weights[token_order], rtol=1e-12, atol=1e-13)
    assert permuted.metrics == pytest.approx(original.metrics, rel=1e-12)


def test_the_metrics_report_kl_with_its_standard_error_and_k3() -> None:
    case = random_case(24)
    metrics = make_objective("disco", HINGE)(to_mini_batch(case)).metrics
    log_ratios = [o - x for o, x in zip(case.old, case.lp, strict=True)]
    total, mean = len(log_ratios), sum(log_ratios) / len(log_ratios)
    std = math.sqrt(sum((d - mean) ** 2 for d in log_ratios) / (total - 1))
    assert metrics["policy/kl_stderr"] == pytest.approx(std / math.sqrt(total), rel=1e-9)
    assert metrics["policy/kl_k3"] == pytest.approx(sum(math.exp(-d) - 1 + d for d in log_ratios) / total, rel=1e-9)
    assert metrics["policy/entropy"] == pytest.approx(sum(case.entropies) / total, rel=1e-9)
    mixed = [{case.is_right(i) for i in case.group(q)} == {True, False} for q in set(case.questions)]
    assert metrics["groups/mixed"] == pytest.approx(sum(mixed) / len(mixed))
