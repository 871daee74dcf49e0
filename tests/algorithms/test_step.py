"""A mini-batch's gradient equals that of one dense autograd pass through transformers' model, with an active hinge.

The reference loss is computed here from transformers' logits, densely and in loops, without the package's objectives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bare_trainer import build_bare_trainer
from safetensors.torch import load_file
from tiny_models import (
    VOCABULARY,
    load_transformers_model,
    model_config,
    random_rollouts,
    save_model,
    transformers_distributions,
)

from nemo_disco.algorithms import build_objective
from nemo_disco.algorithms.step import OldValues, accumulate_gradient
from nemo_disco.config.compose import compose
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy

TEMPERATURE, TAU, BETA = 0.6, 1.0, 1e3
LIMIT = 40


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("qwen2"), "qwen2", tied=True)


@pytest.fixture(scope="module")
def rollouts() -> Rollouts:
    return random_rollouts(questions=32, group=8, longest=LIMIT)


def perturb_weights(model_path: Path) -> dict[str, torch.Tensor]:
    """The model's weights plus noise, in float64, by their names in its file: the policy after some training."""
    generator = torch.Generator().manual_seed(9)
    weights = load_file(model_path / "model.safetensors")
    return {n: w.double() - 2e-3 * torch.randn(w.shape, generator=generator).double() for n, w in weights.items()}


def estimate_kl(new: torch.Tensor, old: torch.Tensor, tokens: torch.Tensor, estimator: str) -> torch.Tensor:
    """KL_hat(old || new) by its definition, from all log-probs [T, V] and the sampled tokens [T].

    estimator: k1, k3, or a number K for the KL over old's K likeliest tokens and one bucket of all others.
    """
    difference = (new - old).gather(1, tokens[:, None])[:, 0]
    if estimator == "k1":
        return -difference.mean()
    if estimator == "k3":
        return (difference.exp() - 1 - difference).mean()
    q, ids = old.exp().topk(int(estimator), 1)
    p = new.exp().gather(1, ids)
    if int(estimator) < VOCABULARY:
        q, p = (torch.cat([x, 1 - x.sum(1, keepdim=True)], 1) for x in (q, p))
    return (q * (q / p).log()).sum(1).mean()


def disco_loss(
    new: torch.Tensor, old: torch.Tensor, rollouts: Rollouts, kind: str, estimator: str
) -> tuple[torch.Tensor, float]:
    """DisCO's loss -J2 + beta max(KL_hat - delta, 0)^2 with delta = KL_hat / 2 (arXiv 2505.12366), and KL_hat.

    new, old [T, V]: log-probs under the policy and before the step. kind: the score. estimator: as for estimate_kl.
    """
    tokens = torch.cat([rollouts.response(i) for i in range(len(rollouts))])
    log_probs, old_log_probs = (x.gather(1, tokens[:, None])[:, 0] for x in (new, old))
    start, value = 0, torch.zeros((), dtype=torch.float64)
    groups: dict[int, dict[bool, list[torch.Tensor]]] = {}
    for i, length in enumerate(rollouts.response_lengths.tolist()):
        lp, old_lp = log_probs[start : start + length], old_log_probs[start : start + length]
        start += length
        group = groups.setdefault(int(rollouts.question_ids[i]), {True: [], False: []})
        if length:
            score = lp.mean() if kind == "log_likelihood" else (lp - old_lp).exp().mean()
            group[bool(rollouts.rewards[i] > 0.5)].append(score)
    for group in groups.values():
        if group[True] and group[False]:
            negatives = torch.stack(group[False])
            value = value + torch.stack(group[True]).mean() - TAU * (negatives / TAU).exp().mean().log()
    kl = estimate_kl(new, old, tokens, estimator)
    delta = 0.5 * float(kl.detach())
    return -value / len(groups) + BETA * (kl - delta).clamp(min=0) ** 2, float(kl.detach())


Reference = tuple[dict[str, Any], dict[str, Any], float]
CASES = [
    ("log_likelihood", "k1"),
    ("likelihood_ratio", "k3"),
    ("log_likelihood", "4"),
    ("log_likelihood", str(VOCABULARY)),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def reference(request: pytest.FixtureRequest, model_path: Path, rollouts: Rollouts) -> Reference:
    """(the objective's settings, the dense float64 gradient at perturbed weights by name, KL_hat)."""
    score, estimator = request.param
    model = load_transformers_model(model_path)
    with torch.no_grad():
        old = transformers_distributions(model, rollouts, TEMPERATURE)
        weights = perturb_weights(model_path)
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    loss, kl = disco_loss(transformers_distributions(model, rollouts, TEMPERATURE), old, rollouts, score, estimator)
    loss.backward()
    constraint = (
        {"estimator": estimator} if not estimator.isdigit() else {"estimator": "top_k", "top_k": int(estimator)}
    )
    settings = {"name": "disco", "score": score, "tau": TAU}
    settings["constraint"] = constraint | {"beta": BETA, "delta": 0.5 * kl}
    return settings, {n: p.grad for n, p in model.named_parameters()}, kl


@pytest.mark.parametrize(
    ("dtype", "budget", "whole_tolerance", "tensor_tolerance"),
    [
        (torch.float64, 128, 1e-9, 1e-9),
        (torch.float64, 2048, 1e-9, 1e-9),
        (torch.float32, 128, 1e-5, 1e-4),
        (torch.float32, 2048, 1e-5, 1e-4),
    ],
)
def test_gradient_equals_the_dense_pass(
    reference: Reference,
    model_path: Path,
    rollouts: Rollouts,
    dtype: torch.dtype,
    budget: int,
    whole_tolerance: float,
    tensor_tolerance: float,
) -> None:
    """The relative errors of the whole gradient and of each tensor's are within the tolerances."""
    settings, expected, kl = reference
    assert kl > 0, "the hinge is not active, so that its gradient would not be tested"
    config = model_config(model_path, token_budget=budget)
    parallel.start(config)
    policy = Policy(config, dtype=dtype, temperature=TEMPERATURE)
    objective = build_objective(settings)
    old = OldValues.compute(policy, objective, rollouts, reference=None)
    policy.load(perturb_weights(model_path).__getitem__)
    metrics = accumulate_gradient(policy, objective, rollouts, old).metrics
    assert metrics["constraint/active"] == 1.0
    assert metrics["constraint/kl"] == pytest.approx(kl, rel=whole_tolerance)
    gradients = {n: g.double() for n, g in policy.named_gradients()}
    errors = {n: float((gradients[n] - g).norm() / g.norm()) for n, g in expected.items()}
    difference = torch.cat([(gradients[n] - g).flatten() for n, g in expected.items()]).norm()
    whole = torch.cat([g.flatten() for g in expected.values()]).norm()
    assert difference <= whole_tolerance * whole
    assert max(errors.values()) <= tensor_tolerance, max(errors, key=errors.__getitem__)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gpg", "rloo", "grpo_er", "grpo top_k"])
def test_one_pass_gives_the_gradient_and_metrics_of_two(model_path: Path, rollouts: Rollouts, name: str) -> None:
    config = model_config(model_path, token_budget=512)
    parallel.start(config)
    policy = Policy(config, dtype=torch.float64, temperature=TEMPERATURE)
    constraint = {"kind": "kl_regularization", "beta": 1.0, "estimator": "top_k", "top_k": 3} if " " in name else {}
    objective = build_objective({"name": name.split()[0], "constraint": constraint})
    assert objective.separable
    old_policy = OldValues.compute(policy, objective, rollouts, reference=None)
    policy.load(perturb_weights(model_path).__getitem__)
    one_pass = accumulate_gradient(policy, objective, rollouts, old_policy)
    gradients = {n: g.clone() for n, g in policy.named_gradients()}

    class InTwoPasses:
        """The same objective without `separable` and `token_loss`, so that the step needs two passes."""

        needs, __call__ = objective.needs, staticmethod(objective.__call__)

    two_passes = accumulate_gradient(policy, InTwoPasses(), rollouts, old_policy)  # type: ignore[arg-type]
    assert one_pass.metrics == pytest.approx(two_passes.metrics, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(one_pass.log_probs, two_passes.log_probs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(one_pass.token_weights, two_passes.token_weights, rtol=1e-9, atol=1e-12)
    for n, gradient in policy.named_gradients():
        torch.testing.assert_close(gradients[n], gradient, rtol=1e-9, atol=1e-12)


def test_the_first_mini_batch_needs_no_forward_pass(
    model_path: Path, rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = model_config(model_path, token_budget=512)
    parallel.start(config)
    policy = Policy(config, dtype=torch.float64, temperature=TEMPERATURE)
    old = OldValues(*policy.log_probs(rollouts))
    objective = build_objective({"name": "disco"})
    expected = accumulate_gradient(policy, objective, rollouts, old).metrics
    gradients = {n: g.clone() for n, g in policy.named_gradients()}
    monkeypatch.setattr(policy, "target_values", None)  # a forward pass alone would raise
    metrics = accumulate_gradient(policy, objective, rollouts, old, first=True).metrics
    assert metrics.pop("policy/noise_floor") < 1e-12
    assert metrics == pytest.approx(expected, rel=1e-9, abs=1e-12)
    for n, gradient in policy.named_gradients():
        torch.testing.assert_close(gradients[n], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["disco", "grpo"])  # in two passes and in one
@pytest.mark.parametrize(("estimator", "expected"), [("k1", 3e-5), ("k3", 0.5 * 3e-5**2)])
def test_the_noise_floor_is_the_kl_of_the_policy_to_itself(
    name: str, estimator: str, expected: float, model_path: Path, rollouts: Rollouts
) -> None:
    config = model_config(model_path, token_budget=512)
    parallel.start(config)
    policy = Policy(config, dtype=torch.float64, temperature=TEMPERATURE)
    log_probs, entropies = policy.log_probs(rollouts, entropies=True)
    old = OldValues(log_probs - 3e-5, entropies)
    kind = "squared_hinge" if name == "disco" else "kl_regularization"
    objective = build_objective({"name": name, "constraint": {"kind": kind, "estimator": estimator}})
    result = accumulate_gradient(policy, objective, rollouts, old, first=True)
    assert result.metrics["policy/noise_floor"] == pytest.approx(expected, rel=1e-4)


def test_every_mini_batch_but_the_first_takes_one_more_forward_pass(
    model_path: Path, rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's passes: the old log-probs of all responses, then for each of 4 mini-batches the scores (which are known
    for the first) and forward and backward together, then the last one's KL. A warning about the engine is logged."""
    config = compose(
        overrides=[
            f"model.path={model_path}",
            "data.train_files=[none]",
            "data.questions_per_step=32",
            "algorithm.mini_batch_questions=8",
            f"generation.max_response_length={LIMIT}",
            "model.token_budget=2048",
            "verify.max_mismatch=1e300",  # no engine sampled these
            "verify.max_kl=1e300",
        ]
    )
    parallel.start(config.model)
    policy = Policy(config.model, dtype=torch.float32)
    passes: list[tuple[bool, int]] = []
    schedule = policy._schedule

    def record_pass(part: Rollouts, *args: Any, forward_only: bool, **options: Any) -> None:
        passes.append((forward_only, len(part)))
        schedule(part, *args, forward_only=forward_only, **options)

    monkeypatch.setattr(policy, "_schedule", record_pass)
    trainer = build_bare_trainer(config, policy=policy, objective=build_objective({"name": "disco"}))
    trainer.agreement.check_step.return_value = "step 1: warning: apart"
    trainer.run_training(rollouts)
    trainer.journal.log.assert_called_once_with("step 1: warning: apart")
    backward, forward = (False, 64), (True, 64)
    assert passes == [(True, 256), backward, forward, backward, forward, backward, forward, backward, forward]
