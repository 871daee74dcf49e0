"""Every objective and constraint trains a step through the whole loop: it has a gradient and moves the weights."""

from __future__ import annotations

import pytest
import torch
from commands import QUICKSTART, read_metrics, run_directory
from safetensors.torch import load_file

KINDS = {
    "disco": (),
    "disco by likelihood ratio": ("algorithm.score=likelihood_ratio", "algorithm.tau=1"),
    "disco as released": ("algorithm.constraint.convention=released_code",),
    "disco regularised": ("algorithm.constraint.kind=kl_regularization",),
    "disco unconstrained": ("algorithm.constraint.kind=none",),
    "disco_b": ("algorithm=disco_b",),
    "disco_b by likelihood ratio": ("algorithm=disco_b", "algorithm.score=likelihood_ratio"),
    "drpo": ("algorithm=drpo", "algorithm.lambda=0.2"),
    "grpo against a reference": ("algorithm=grpo", "algorithm.kl_coefficient=0.01"),
    **{
        name: (f"algorithm={name}",)
        for name in ("grpo", "grpo_er", "grpo_rw", "dr_grpo", "dapo", "trpa", "gpg", "rloo")
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


def test_the_reference_holds_the_policy_back(commands, tmp_path):
    for name, coefficient in (("free", 0.0), ("held", 1.0)):
        overrides = ("algorithm=grpo", f"algorithm.kl_coefficient={coefficient}", "trainer.max_steps=2")
        commands("train", *overrides, run_directory(tmp_path / name)).ok()
    free, penalized = (load_file(tmp_path / name / "export/model.safetensors") for name in ("free", "held"))
    assert any(not torch.equal(free[name], penalized[name]) for name in free)
    first, second = ([line["grad_norm"] for line in read_metrics(tmp_path / name)] for name in ("free", "held"))
    assert first != second
