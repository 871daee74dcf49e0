"""One step of asynchrony through the real trainer, on an engine in a process of its own that is arithmetic: what it
samples overlaps training, carries its version, and survives resuming, signals and the engine's death."""

from __future__ import annotations

import json
import re
import shutil
import signal

import pytest
from commands import WHOLE, at, metrics
from fake_engine import ANY_MISMATCH, fake_python
from same_run import TIMES, assert_same

COIN = "def coin(response, answer):\n    return float(len(response) % 2)\n"
# It gives the engine time beside it, however busy the machine.
LASTING = """
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
AHEAD = "generation.asynchronous=true"
RESPONSES = 16
DELAY_S = 0.1  # a response


@pytest.fixture
def apart(tmp_path):
    """apart(run, **options) -> the arguments of a run on a fake engine with these options, and its environment."""
    (tmp_path / "coins.py").write_text(COIN)
    python = fake_python(tmp_path)

    def settings(run, **options):
        given = ", ".join(f"{name}: {value!r}" for name, value in options.items())
        return (
            "generation=vllm",
            *ANY_MISMATCH,
            f"generation.python={python}",
            "generation.colocated=false",
            "algorithm.off_policy.kind=truncated_importance_sampling",
            f"generation.options={{{given}}}",
            "reward.verifier=coins:coin",
            "reward.require_think=false",
            "trainer.max_steps=3",
            at(run),
        ), {"PYTHONPATH": str(tmp_path)}

    return settings


def staleness(run):
    return [(line["staleness/mean"], line["staleness/max"]) for line in metrics(run)]


def asked(run):
    """The questions of each step."""
    files = sorted((run / "rollouts").iterdir())
    return [[json.loads(line)["question_id"] for line in file.read_text().splitlines()] for file in files]


def timeless(line):
    return {name: value for name, value in line.items() if not name.startswith(TIMES)}


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_step_takes_less_than_sampling_and_training(ranks, commands, apart, tmp_path):
    runs = tmp_path / "in turn", tmp_path / "ahead"
    (tmp_path / "lasting.py").write_text(LASTING)
    for run, more in zip(runs, ((), (AHEAD,)), strict=True):
        overrides, environment = apart(run, slow=DELAY_S)
        more = (f"exp_manager.saved_rollouts={RESPONSES}", "algorithm.name=lasting:Lasting", *more)
        commands("train", *overrides, *more, ranks=ranks, **environment).ok()
    in_turn, ahead = map(metrics, runs)
    assert staleness(runs[0]) == [(0, 0)] * 3 and staleness(runs[1]) == [(0, 0), (1, 1), (1, 1)]
    assert asked(runs[0]) == asked(runs[1])
    assert timeless(in_turn[0]) == timeless(ahead[0]) and timeless(in_turn[1]) != timeless(ahead[1])
    # The second step asks for the third's while it trains; what it waits for then is the rest of the sampling.
    waited = [lines[1]["time/generate"] for lines in (in_turn, ahead)]
    assert waited[0] > RESPONSES * DELAY_S > waited[1]
    assert ahead[2]["time/generate"] < RESPONSES * DELAY_S / 2  # the last step asks for nothing more
    assert set(ahead[2]) == set(in_turn[2])


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_resumed_it_asks_what_it_had_asked_and_ends_the_same_each_time(ranks, commands, apart, tmp_path):
    """With an evaluation after each step, between what was asked ahead and its turn."""
    run = tmp_path / "run"
    settings = (*WHOLE, "evaluation.every_n_steps=1", AHEAD)
    overrides, environment = apart(run)
    commands("train", *overrides, *settings, ranks=ranks, **environment).ok()
    lives = [tmp_path / "one", tmp_path / "two"]
    for life in lives:
        shutil.copytree(run, life)
        shutil.rmtree(life / "checkpoints/step_4")
        overrides, _ = apart(life)
        done = commands("train", *overrides, *settings, ranks=ranks, **environment).ok()
        assert "resumed from step 2" in done.err
    assert_same(*lives)
    assert staleness(run) == [(0, 0), (1, 1), (1, 1), (1, 1)]
    assert staleness(lives[0]) == [(0, 0), (1, 1), (0, 0), (1, 1)]  # what was asked ahead is asked anew
    assert asked(lives[0]) == asked(run)
    loops = [json.loads((r / "checkpoints/step_4/checkpoint.json").read_text())["loop_state"] for r in (run, lives[0])]
    assert loops[0]["sampler"] == loops[1]["sampler"]
    assert all("eval/test/pass@1" in line for line in metrics(run))


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_engine_that_dies_while_the_policy_trains_goes_on_with_its_new_weights(ranks, commands, apart, tmp_path):
    run = tmp_path / "run"
    faults = {"fault": "generate", "how": "kill", "call": 2, "at": 5, "once": str(tmp_path / "once")}
    overrides, environment = apart(run, **faults)
    done = commands("train", *overrides, AHEAD, ranks=ranks, **environment).ok()
    assert "was killed by SIGKILL" in done.err + done.out and "trying again with all weights" in done.err + done.out
    # Five of the second step's responses were there; the others are from the weights that it is trained on.
    assert staleness(run) == [(0, 0), (5 / RESPONSES, 1), (1, 1)]


def test_dynamic_sampling_goes_on_from_newer_weights(commands, apart, tmp_path):
    run = tmp_path / "run"
    overrides, environment = apart(run)
    rounds = ("algorithm.dynamic_sampling_rounds=3", "generation.responses_per_question=2")
    commands("train", *overrides, *rounds, AHEAD, **environment).ok()
    lines = metrics(run)
    again = [line["groups/sampled"] > 4 for line in lines]
    assert any(again[1:])
    for line, more in zip(lines[1:], again[1:], strict=True):
        assert line["staleness/mean"] <= 1 and (more or line["staleness/mean"] == 1)
    assert min(line["staleness/mean"] for line in lines[1:]) < 1


@pytest.mark.slow
def test_asked_to_stop_while_the_engine_samples_it_saves_what_is_trained(commands, apart, tmp_path):
    run = tmp_path / "run"
    overrides, environment = apart(run, slow=DELAY_S)
    started = commands.start("train", *overrides, AHEAD, "trainer.max_steps=1000", devices=2, **environment)
    started.wait_for(run / "rollouts/step_2.jsonl")
    started.process.send_signal(signal.SIGTERM)
    done = started.wait().ok()
    said = re.search(r"asked to stop by SIGTERM: saved step (\d+)", done.out)
    assert said is not None, done.out
    state = json.loads((run / f"checkpoints/step_{said[1]}/checkpoint.json").read_text())["loop_state"]
    assert state["sampler"]["position"] + 64 * state["sampler"]["epoch"] == 4 * int(said[1])
