"""One pass: the token losses of a separable objective add up to its loss, however the tokens are split."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from .cases import NONE, OBJECTIVES, PENALTIES, SEPARABLE, make_objective, odd_cases, random_case, to_mini_batch

LINEAR = [name for name, penalty in PENALTIES.items() if penalty["kind"] != "squared_hinge"]


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_objectives_that_are_sums_over_tokens_are_separable_without_a_hinge(name: str, penalty: str) -> None:
    objective = make_objective(name, PENALTIES[penalty])
    assert objective.separable == (name in SEPARABLE and penalty in LINEAR)


@pytest.mark.parametrize("case", ["ragged", "some empty", "extreme ratios", "shaped rewards, own verdicts"])
@pytest.mark.parametrize("penalty", LINEAR)
@pytest.mark.parametrize("name", SEPARABLE)
def test_any_split_of_the_tokens_gives_the_loss_and_its_gradient(name: str, penalty: str, case: str) -> None:
    batch = to_mini_batch(odd_cases()[case])
    objective = make_objective(name, PENALTIES[penalty])
    whole = objective(batch)
    # token_loss must not read the batch's log-probs, which the step does not have yet: wrong ones change nothing.
    unknown = {"log_probs": batch.old_log_probs - 1, "entropies": None, "divergences": None}
    token_loss = objective.token_loss(replace(batch, **unknown))
    order = torch.randperm(batch.n_tokens, generator=torch.Generator().manual_seed(1))
    leaves = [x.clone().requires_grad_() for x in (batch.log_probs, batch.entropies, batch.divergences)]
    total = 0.0
    for index in order.split([4, 0, 1, batch.n_tokens - 5]):
        loss = token_loss(index, *(x[index] for x in leaves))
        assert loss.shape == index.shape
        assert loss.dtype == torch.float64
        loss.sum().backward()
        total += float(loss.detach().sum())
    scale = float(whole.token_weights.abs().max())
    assert total == pytest.approx(float(whole.loss), rel=1e-12, abs=1e-14 * max(1, scale))
    expected = [whole.token_weights, whole.entropy_weights, whole.divergence_weights]
    for leaf, weights in zip(leaves, expected, strict=True):
        if weights is not None:
            torch.testing.assert_close(leaf.grad, weights, rtol=1e-12, atol=1e-18 * scale)


def test_the_gradient_comes_back_in_the_policys_own_dtype() -> None:
    batch = to_mini_batch(random_case(51), torch.float32)
    token_loss = make_objective("grpo", NONE).token_loss(batch)
    log_probs = batch.log_probs.clone().requires_grad_()
    token_loss(torch.arange(batch.n_tokens), log_probs).sum().backward()
    assert log_probs.grad.dtype == torch.float32
    expected = make_objective("grpo", NONE)(batch).token_weights
    torch.testing.assert_close(log_probs.grad.double(), expected, rtol=1e-6, atol=1e-12)


def test_a_penalty_on_the_whole_mini_batch_has_no_token_loss() -> None:
    batch = to_mini_batch(random_case(52))
    with pytest.raises(ValueError, match="grpo is not separable under squared_hinge"):
        make_objective("grpo", PENALTIES["paper"]).token_loss(batch)


def test_a_missing_field_that_an_objective_needs_is_refused_by_name() -> None:
    batch = replace(to_mini_batch(random_case(53)), entropies=None, reference_log_probs=None)
    with_entropy, with_reference = make_objective("grpo_er", NONE), make_objective("grpo reference", NONE)
    assert with_entropy.needs == {"entropies"}
    assert with_reference.needs == {"reference_log_probs"}
    assert make_objective("disco", NONE).needs == make_objective("grpo", NONE).needs == frozenset()
    with pytest.raises(ValueError, match="grpo_er needs the mini-batch's entropies"):
        with_entropy(batch)
    with pytest.raises(ValueError, match="grpo needs the mini-batch's reference_log_probs"):
        with_reference.token_loss(batch)
    token_loss = with_entropy.token_loss(batch)
    with pytest.raises(ValueError, match="needs the tokens' entropies"):
        token_loss(torch.arange(2), batch.log_probs[:2])


def test_the_callers_inference_mode_and_graph_do_not_matter() -> None:
    """The caller may be in inference mode, and its log-probs may be part of a graph: the output is the same."""
    with torch.inference_mode():
        batch = to_mini_batch(random_case(54))
        output = make_objective("disco", NONE)(batch)
    assert output.token_weights.any()
    batch = to_mini_batch(random_case(54))
    attached = replace(batch, log_probs=batch.log_probs.clone().requires_grad_() * 1)
    again = make_objective("disco", NONE)(attached)
    assert again.token_weights.equal(output.token_weights)
    assert not again.loss.requires_grad
    assert not again.token_weights.requires_grad
    compared = make_objective("grpo", PENALTIES["kl top_k"])
    with pytest.raises(ValueError, match="grpo needs the mini-batch's divergences"):
        compared(replace(batch, divergences=None))
    with pytest.raises(ValueError, match="grpo needs the tokens' divergences"):
        compared.token_loss(batch)(torch.arange(2), batch.log_probs[:2])
