"""Length methods, composed rewards, off-policy correction and the sampler's options, through the real trainer."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from commands import QUICKSTART, WHOLE_RUN, read_metrics, run_directory
from safetensors.torch import load_file
from same_run import assert_same_run, load_tensors

REWARDS = '''
import math


def by_level(r):
    """A reward from the question's level, the response's length and the verdict."""
    return 0.1 * r.metadata["level"] * r.correct - r.length / r.max_response_length


def breaks(r):
    return math.nan if r.metadata["level"] == 3 else 0.0


def raises(r):
    return r.metadata["no such field"]
'''
KINDS = {
    "rloo_lp": ("algorithm=rloo_lp", "algorithm.alpha=0.4"),
    "alp": ("algorithm=alp", "algorithm.beta=1e-3"),
    "hapo": ("algorithm=hapo", "algorithm.length_weight=1"),
    "grpo_lead": ("algorithm=grpo_lead", "algorithm.alpha=0.1", "algorithm.parameters.slope=5"),
    "drpo by a term": ("algorithm=drpo", "algorithm.preference=overlong"),
    "drpo by a function": ("algorithm=drpo", "algorithm.preference=my_rewards:by_level"),
    "disco truncated": ("algorithm.off_policy.kind=truncated_importance_sampling",),
    "grpo masked": ("algorithm=grpo", "algorithm.off_policy.kind=sequence_mask"),
    "dapo whole": ("algorithm=dapo", "reward=overlong", "algorithm.dynamic_sampling_rounds=3"),
}


@pytest.fixture
def train(commands, tmp_path):
    """A function that trains on questions with a `level` in their metadata; the module my_rewards has REWARDS."""
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    lines = (QUICKSTART / "train.jsonl").read_text().splitlines()[:16]
    records = [json.loads(line) | {"level": i % 4} for i, line in enumerate(lines)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def run_command(*overrides, run="run", ranks=1):
        files = f"data.train_files=[{tmp_path}/q.jsonl]"
        environment = {"PYTHONPATH": str(tmp_path)}
        return commands("train", files, *overrides, run_directory(tmp_path / run), ranks=ranks, **environment)

    return run_command


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_each_method_moves_the_weights(kind, train, tmp_path):
    train(*KINDS[kind], "generation.responses_per_question=8").ok()
    (line,) = read_metrics(tmp_path / "run")
    assert line["mini_batches/skipped"] == 0 and line["grad_norm"] > 0
    assert line["mismatch/mean_abs"] < 1e-5 and line["mismatch/mean_exp_abs"] == pytest.approx(1, abs=1e-5)
    assert abs(line["mismatch/kl_k1"]) <= line["mismatch/mean_abs"] <= line["mismatch/max_abs"]
    assert 0 <= line["mismatch/kl_k3"] < 1e-9
    before = load_file(QUICKSTART / "model/model.safetensors")
    after = load_file(tmp_path / "run/export/model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    if "off_policy" in str(KINDS[kind]):  # this engine and the trainer agree
        assert line["off_policy/factor_mean"] == pytest.approx(1, abs=1e-5) and line["off_policy/cut"] == 0
    if kind == "dapo whole":
        assert line["groups/sampled"] == 4 + line["groups/dropped"]


def test_a_composed_reward_reaches_the_step_and_leaves_the_verdict_alone(train, tmp_path):
    terms = ("reward.terms.format=0.5", "reward.function=my_rewards:by_level")
    train("algorithm=grpo", *terms, "exp_manager.saved_rollouts=100").ok()
    (line,) = read_metrics(tmp_path / "run")
    responses = [json.loads(text) for text in (tmp_path / "run/rollouts/step_1.jsonl").read_text().splitlines()]
    level = {json.loads(t)["problem"]: json.loads(t)["level"] for t in (tmp_path / "q.jsonl").read_text().splitlines()}
    for r in responses:
        has_format = re.search(r"</think>.*\\boxed\{[^{}]+\}", r["response"], re.DOTALL) is not None
        expected = r["correct"] * (1 + 0.1 * level[r["question"]]) + 0.5 * has_format - r["length"] / 64
        assert r["reward"] == pytest.approx(expected)
    assert line["reward/mean"] == pytest.approx(sum(r["reward"] for r in responses) / len(responses))
    assert line["reward/correct"] == pytest.approx(sum(r["correct"] for r in responses) / len(responses))


@pytest.mark.slow
def test_disco_is_split_by_the_verdict_and_not_by_the_shaped_reward(train, tmp_path):
    for run, *overrides in (("plain",), ("shaped", "reward.terms.correctness=-1", "reward.terms.length=5")):
        train("generation.responses_per_question=8", *overrides, run=run).ok()
    plain, shaped = (read_metrics(tmp_path / run)[0] for run in ("plain", "shaped"))
    assert plain["reward/mean"] != shaped["reward/mean"]
    assert plain["grad_norm"] == shaped["grad_norm"] and plain["objective/value"] == shaped["objective/value"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("breaks", "my_rewards.py:10 must return a finite number; it returned nan"),
        ("raises", "my_rewards:raises raised KeyError at {}/my_rewards.py:15: 'no such field'"),
    ],
)
def test_a_users_function_that_fails_stops_the_run_before_the_update(name, words, ranks, train, tmp_path):
    result = train(f"reward.function=my_rewards:{name}", "data.questions_per_step=8", ranks=ranks)
    assert result.code == 2
    (error,) = {line for line in result.err.splitlines() if line.startswith("error: ")}  # the launcher prints it once
    assert words.format(tmp_path) in error and "Traceback" not in result.err
    assert not (tmp_path / "run/metrics.jsonl").read_text()
    assert not (tmp_path / "run/checkpoints").exists() or not list((tmp_path / "run/checkpoints").glob("step_*"))


@pytest.mark.slow
def test_the_response_limit_rises_in_the_run(train, tmp_path):
    train(
        "generation.max_response_length=16", "generation.response_length_schedule=[[1,64]]", "trainer.max_steps=2"
    ).ok()
    first, second = read_metrics(tmp_path / "run")
    assert (first["response/limit"], second["response/limit"]) == (16, 64)
    assert first["response/length_mean"] <= 16 < second["response/length_mean"]


# The same four questions in every step, so that HAPO has a history; 8 responses, so that some are right.
FOUR_QUESTIONS = (*WHOLE_RUN, "generation.responses_per_question=8")


@pytest.fixture
def train_on_four(train, tmp_path):
    """A function like `train` that asks the same four questions in every step and must succeed."""
    lines = (QUICKSTART / "train.jsonl").read_text().splitlines(keepends=True)[:4]
    (tmp_path / "four.jsonl").write_text("".join(lines))
    return lambda run, *overrides, ranks=1: train(
        *FOUR_QUESTIONS, f"data.train_files=[{tmp_path}/four.jsonl]", *overrides, run=run, ranks=ranks
    ).ok()


def remove_step_4(run: Path) -> None:
    shutil.rmtree(run / "checkpoints/step_4")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_hapo_goes_on_bit_for_bit_with_its_history(ranks, train_on_four, tmp_path):
    hapo = ("algorithm=hapo", "algorithm.length_weight=1")
    train_on_four("whole", *hapo, ranks=ranks)
    lines = read_metrics(tmp_path / "whole")
    assert lines[0]["reward/shaped_mean"] == lines[0]["reward/mean"]  # there is no history yet
    assert lines[3]["reward/shaped_mean"] != lines[3]["reward/mean"]
    record = json.loads((tmp_path / "whole/checkpoints/step_2/checkpoint.json").read_text())
    assert record["loop_state"]["shortest_correct"]
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    remove_step_4(tmp_path / "again")
    train_on_four("again", *hapo, ranks=ranks)
    assert_same_run(tmp_path / "again", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_reference_that_is_reset_goes_on_bit_for_bit(ranks, train_on_four, tmp_path):
    grpo = ("algorithm=grpo", "algorithm.kl_coefficient=1", "algorithm.reference_reset_steps=1")
    train_on_four("whole", *grpo, ranks=ranks)
    train_on_four("never", *grpo[:2], ranks=ranks)
    whole, never = (read_metrics(tmp_path / run) for run in ("whole", "never"))
    assert whole[0]["grad_norm"] == never[0]["grad_norm"] and whole[2]["grad_norm"] != never[2]["grad_norm"]
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    remove_step_4(tmp_path / "again")
    again = train_on_four("again", *grpo, ranks=ranks)
    assert "step 3: the policy becomes the reference from here on" in again.out
    assert_same_run(tmp_path / "again", tmp_path / "whole")
    state = load_tensors(tmp_path / "whole/checkpoints/step_4")
    policy = {name: t for name, t in state.items() if f"reference.{name}" in state}
    # The reference was reset at the end of this step.
    assert policy and all(torch.equal(t, state[f"reference.{name}"]) for name, t in policy.items())


EXITS = """
import sys
from nemo_disco.algorithms import Objective

class Ends(Objective):
    def value(self, batch):
        sys.exit(0)

def reward(*args):
    sys.exit(0)

class Judge:
    def grade(self, responses, answers):
        sys.exit(0)
    def close(self): ...
    def __enter__(self): return self
    def __exit__(self, *_): ...
"""


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (("algorithm=base", "algorithm.name=exits:Ends"), 7),
        (("reward.verifier=exits:reward",), 10),
        (("reward.function=exits:reward",), 10),
        (("reward.verifier=exits:Judge",), 14),
    ],
)
def test_users_code_that_exits_does_not_end_the_run_well(settings, line, commands, tmp_path):
    (tmp_path / "exits.py").write_text(EXITS)
    result = commands("train", *settings, run_directory(tmp_path / "run"), PYTHONPATH=str(tmp_path))
    assert result.code == 2 and "Traceback" not in result.err
    errors = [text for text in result.err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1 and f"SystemExit at {tmp_path}/exits.py:{line}: 0" in errors[0]
