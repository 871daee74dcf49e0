"""Every objective and constraint trains a step through the whole loop: it has a gradient and moves the weights."""

from __future__ import annotations

import math

import pytest
import torch
from commands import QUICKSTART, read_metrics, run_directory
from safetensors.torch import load_file
from same_run import TIMES

KINDS = {
    "disco": (),
    "disco by likelihood ratio": ("algorithm.score=likelihood_ratio", "algorithm.tau=1"),
    "disco as released": ("algorithm.constraint.convention=released_code",),
    "disco regularised": ("algorithm.constraint.kind=kl_regularization",),
    "disco unconstrained": ("algorithm.constraint.kind=none",),
    "disco by the likely tokens": ("algorithm.constraint.estimator=top_k", "algorithm.constraint.top_k=4"),
    "disco as by the authors": ("algorithm=authors",),
    "disco for small mini-batches": ("algorithm=disco_small",),
    "grpo constrained": ("algorithm=grpo_constrained",),
    "disco_b": ("algorithm=disco_b",),
    "disco_b by likelihood ratio": ("algorithm=disco_b", "algorithm.score=likelihood_ratio"),
    "drpo": ("algorithm=drpo", "algorithm.lambda=0.2"),
    "grpo against a reference": ("algorithm=grpo", "algorithm.kl_coefficient=0.01"),
    **{
        name: (f"algorithm={name}",)
        for name in (
            *("grpo", "grpo_er", "grpo_rw", "dr_grpo", "dapo", "trpa", "gpg", "rloo"),
            *("gspo", "cispo", "sapo", "dppo", "divergence_regularized", "maxrl", "conspo"),
        )
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_moves_the_weights(kind, commands, tmp_path):
    run = tmp_path / "run"
    more = "generation.responses_per_question=8"  # so that some are right
    commands("train", *KINDS[kind], more, run_directory(run)).ok()
    (line,) = read_metrics(run)
    assert line["mini_batches/skipped"] == 0
    assert line["groups/mixed"] > 0 and line["grad_norm"] > 0
    before, after = load_file(QUICKSTART / "model/model.safetensors"), load_file(run / "export/model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_dual_constraint_goes_on_with_its_multiplier_after_a_resume(commands, tmp_path):
    """Two lives of two steps are one of four: multiplier, KL and the questions never solved are those of one life."""
    bounds = (
        "algorithm.constraint.beta_min=0.1",
        "algorithm.constraint.beta_max=10",
        "algorithm.constraint.delta=1e-3",
    )
    estimator = ("algorithm.constraint.estimator=top_k", "algorithm.constraint.top_k=512")  # the whole vocabulary
    settings = ("algorithm.constraint.kind=dual", *bounds, *estimator, "model.optim.sched.name=constant")
    for steps in (2, 4):
        commands("train", *settings, f"trainer.max_steps={steps}", run_directory(tmp_path / "two")).ok()
    commands("train", *settings, "trainer.max_steps=4", run_directory(tmp_path / "one")).ok()
    lines, expected = read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one")
    for line, other in zip(lines, expected, strict=True):
        assert {n: v for n, v in line.items() if not n.startswith(TIMES)} == {
            n: v for n, v in other.items() if not n.startswith(TIMES)
        }
    betas = [line["constraint/beta"] for line in lines]
    assert betas[0] == 1.0 and len(set(betas)) == 4
    for line, following in zip(lines, betas[1:], strict=False):
        excess = min(1.0, line["constraint/kl_after_over_delta"] - 1)
        assert following == pytest.approx(line["constraint/beta"] * math.exp(0.1 * excess), rel=1e-9)
        assert line["policy/kl_after"] > 0 and 0 <= line["groups/never_solved"] <= 1
    # Another beta is where it goes on from, and a constraint that was not dual leaves nothing behind.
    hinge, limit = "algorithm.constraint.kind=squared_hinge", "trainer.max_steps={}".format
    commands("train", *settings, "algorithm.constraint.beta=5", limit(5), run_directory(tmp_path / "one")).ok()
    assert read_metrics(tmp_path / "one")[-1]["constraint/beta"] == 5.0
    commands("train", *settings, hinge, limit(5), run_directory(tmp_path / "two")).ok()
    commands("train", *settings, limit(6), run_directory(tmp_path / "two")).ok()
    assert read_metrics(tmp_path / "two")[-1]["constraint/beta"] == 1.0


def test_more_likely_tokens_than_the_model_has_are_refused(commands, tmp_path):
    settings = ("algorithm.constraint.estimator=top_k", "algorithm.constraint.top_k=513", run_directory(tmp_path))
    for command in ("train", "verify", "plan"):
        result = commands(command, *settings)
        assert result.code != 0
        assert "algorithm.constraint.top_k=513: the model has 512 tokens" in result.err


def test_the_reference_holds_the_policy_back(commands, tmp_path):
    for name, coefficient in (("free", 0.0), ("held", 1.0)):
        overrides = ("algorithm=grpo", f"algorithm.kl_coefficient={coefficient}", "trainer.max_steps=2")
        commands("train", *overrides, run_directory(tmp_path / name)).ok()
    free, penalized = (load_file(tmp_path / name / "export/model.safetensors") for name in ("free", "held"))
    assert any(not torch.equal(free[name], penalized[name]) for name in free)
    first, second = ([line["grad_norm"] for line in read_metrics(tmp_path / name)] for name in ("free", "held"))
    assert first != second
