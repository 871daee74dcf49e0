"""One step of asynchrony through the real trainer, with a fake engine in a process of its own: sampling overlaps
training, responses carry their weight version, and a run survives resuming, signals and the engine's death."""

from __future__ import annotations

import json
import re
import shutil
import signal

import pytest
from commands import WHOLE_RUN, read_metrics, run_directory
from fake_engine import ANY_MISMATCH, fake_python
from same_run import TIMES, assert_same_run

COIN = "def coin(response, answer):\n    return float(len(response) % 2)\n"
# An objective that takes 0.3 s, in which the engine can sample, however busy the machine is.
SLOW_OBJECTIVE = """
import time
from dataclasses import dataclass
from typing import ClassVar
from nemo_disco.algorithms.objectives.disco import DisCO

@dataclass(frozen=True, kw_only=True)
class Lasting(DisCO):
    name: ClassVar[str] = "lasting"

    def value(self, batch):
        time.sleep(0.3)
        return super().value(batch)
"""
ASYNCHRONOUS = "generation.asynchronous=true"
RESPONSES = 16
DELAY_S = 0.1  # for each response


@pytest.fixture
def make_settings(tmp_path):
    """make_settings(run, **options) -> overrides and environment of a run whose fake engine has these options."""
    (tmp_path / "coins.py").write_text(COIN)
    python = fake_python(tmp_path)

    def settings(run, **options):
        engine_options = ", ".join(f"{name}: {value!r}" for name, value in options.items())
        return (
            "generation=vllm",
            *ANY_MISMATCH,
            f"generation.python={python}",
            "generation.colocated=false",
            "algorithm.off_policy.kind=truncated_importance_sampling",
            f"generation.options={{{engine_options}}}",
            "reward.verifier=coins:coin",
            "reward.require_think=false",
            "trainer.max_steps=3",
            run_directory(run),
        ), {"PYTHONPATH": str(tmp_path)}

    return settings


def read_staleness(run):
    """(mean, maximum) of the staleness in each step."""
    return [(line["staleness/mean"], line["staleness/max"]) for line in read_metrics(run)]


def read_questions(run):
    """The question ids of the rollouts that each step saved."""
    files = sorted((run / "rollouts").iterdir())
    return [[json.loads(line)["question_id"] for line in file.read_text().splitlines()] for file in files]


def without_times(line):
    return {name: value for name, value in line.items() if not name.startswith(TIMES)}


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_step_takes_less_than_sampling_and_training(ranks, commands, make_settings, tmp_path):
    runs = tmp_path / "in turn", tmp_path / "ahead"
    (tmp_path / "lasting.py").write_text(SLOW_OBJECTIVE)
    for run, more in zip(runs, ((), (ASYNCHRONOUS,)), strict=True):
        overrides, environment = make_settings(run, slow=DELAY_S)
        more = (f"exp_manager.saved_rollouts={RESPONSES}", "algorithm.name=lasting:Lasting", *more)
        commands("train", *overrides, *more, ranks=ranks, **environment).ok()
    in_turn, ahead = map(read_metrics, runs)
    assert read_staleness(runs[0]) == [(0, 0)] * 3 and read_staleness(runs[1]) == [(0, 0), (1, 1), (1, 1)]
    assert read_questions(runs[0]) == read_questions(runs[1])
    assert without_times(in_turn[0]) == without_times(ahead[0]) and without_times(in_turn[1]) != without_times(ahead[1])
    # While the second step trains, the engine samples for the third; the step then waits for the rest of that sampling.
    waits = [lines[1]["time/generate"] for lines in (in_turn, ahead)]
    assert waits[0] > RESPONSES * DELAY_S > waits[1]
    assert ahead[2]["time/generate"] < RESPONSES * DELAY_S / 2  # the last step requests no further responses
    assert set(ahead[2]) == set(in_turn[2])


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resumed_run_asks_the_same_questions_and_ends_the_same_each_time(ranks, commands, make_settings, tmp_path):
    """An evaluation follows each step, after the next step's responses were requested and before they are used."""
    run = tmp_path / "run"
    settings = (*WHOLE_RUN, "evaluation.every_n_steps=1", ASYNCHRONOUS)
    overrides, environment = make_settings(run)
    commands("train", *overrides, *settings, ranks=ranks, **environment).ok()
    lives = [tmp_path / "one", tmp_path / "two"]
    for life in lives:
        shutil.copytree(run, life)
        shutil.rmtree(life / "checkpoints/step_4")
        overrides, _ = make_settings(life)
        result = commands("train", *overrides, *settings, ranks=ranks, **environment).ok()
        assert "resumed from step 2" in result.err
    assert_same_run(*lives)
    assert read_staleness(run) == [(0, 0), (1, 1), (1, 1), (1, 1)]
    # Responses that were requested ahead are requested anew.
    assert read_staleness(lives[0]) == [(0, 0), (1, 1), (0, 0), (1, 1)]
    assert read_questions(lives[0]) == read_questions(run)
    loops = [json.loads((r / "checkpoints/step_4/checkpoint.json").read_text())["loop_state"] for r in (run, lives[0])]
    assert loops[0]["sampler"] == loops[1]["sampler"]
    assert all("eval/test/pass@1" in line for line in read_metrics(run))


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_engine_that_dies_while_the_policy_trains_goes_on_with_its_new_weights(
    ranks, commands, make_settings, tmp_path
):
    run = tmp_path / "run"
    faults = {"fault": "generate", "how": "kill", "call": 2, "at": 5, "once": str(tmp_path / "once")}
    overrides, environment = make_settings(run, **faults)
    result = commands("train", *overrides, ASYNCHRONOUS, ranks=ranks, **environment).ok()
    output = result.err + result.out
    assert "was killed by SIGKILL" in output and "trying again with all weights" in output
    # Five of the second step's responses were there; the others are sampled from the weights that this step trains.
    assert read_staleness(run) == [(0, 0), (5 / RESPONSES, 1), (1, 1)]


def test_dynamic_sampling_goes_on_from_newer_weights(commands, make_settings, tmp_path):
    run = tmp_path / "run"
    overrides, environment = make_settings(run)
    rounds = ("algorithm.dynamic_sampling_rounds=3", "generation.responses_per_question=2")
    commands("train", *overrides, *rounds, ASYNCHRONOUS, **environment).ok()
    lines = read_metrics(run)
    again = [line["groups/sampled"] > 4 for line in lines]
    assert any(again[1:])
    for line, more in zip(lines[1:], again[1:], strict=True):
        assert line["staleness/mean"] <= 1 and (more or line["staleness/mean"] == 1)
    assert min(line["staleness/mean"] for line in lines[1:]) < 1


@pytest.mark.slow
def test_asked_to_stop_while_the_engine_samples_it_saves_what_is_trained(commands, make_settings, tmp_path):
    run = tmp_path / "run"
    overrides, environment = make_settings(run, slow=DELAY_S)
    command = commands.start("train", *overrides, ASYNCHRONOUS, "trainer.max_steps=1000", devices=2, **environment)
    command.wait_for(run / "rollouts/step_2.jsonl")
    command.process.send_signal(signal.SIGTERM)
    result = command.wait().ok()
    match = re.search(r"asked to stop by SIGTERM: saved step (\d+)", result.out)
    assert match is not None, result.out
    state = json.loads((run / f"checkpoints/step_{match[1]}/checkpoint.json").read_text())["loop_state"]
    assert state["sampler"]["position"] + 64 * state["sampler"]["epoch"] == 4 * int(match[1])
