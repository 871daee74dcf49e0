"""However a run's files are damaged, a command that reads them succeeds or ends with an error of one line.

The commands are run in this process, with a policy that is built once.
"""

from __future__ import annotations

import contextlib
import shutil

import pytest
import torch.distributed as dist
from commands import WHOLE_RUN, run_directory
from damage import damage_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from in_process import run_in_process

from nemo_disco.algorithms.agreement import Agreement
from nemo_disco.algorithms.trainer import Trainer
from nemo_disco.commands import components
from nemo_disco.config.compose import load_run_config
from nemo_disco.data.tokenizer import load_tokenizer
from nemo_disco.policy import parallel
from nemo_disco.runtime.errors import UserError

STOPPED = "stopped by the test"


@pytest.fixture
def _policy_built_once(monkeypatch, finished_run):
    """Gives the commands one policy, built here, and stops them before they would train a step or sample."""

    def stop(*_, **__):
        raise UserError(STOPPED)

    config = load_run_config(finished_run.path / "config.yaml")
    parallel.start(config.model, config.seed)
    policy = components.build_policy(config, load_tokenizer(config.model.path, False))
    monkeypatch.setattr(components, "process_groups", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(components, "build_policy", lambda *_, **__: policy)
    monkeypatch.setattr(Agreement, "check_engine", stop)  # what `evaluate` calls once the weights are loaded
    monkeypatch.setattr(Trainer, "train_step", stop)
    yield
    if dist.is_initialized():
        parallel.stop()


@pytest.mark.usefixtures("_policy_built_once")
@pytest.mark.parametrize("finished_run", [1], indirect=True, ids=["DP1"])
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_damaged_run_is_used_or_refused_in_one_line(command, finished_run, commands, tmp_path):
    run = tmp_path / "run"
    names = sorted(str(path.relative_to(finished_run.path)) for path in finished_run.path.rglob("*") if path.is_file())
    names = [name for name in names if not name.startswith(("tensorboard", "checkpoints/step_2", "export"))]
    arguments = {
        "train": commands.arguments("train", "trainer.devices=1", *WHOLE_RUN, run_directory(run)),
        "evaluate": commands.arguments(
            "evaluate", "trainer.devices=1", f"model.path={run}", run_directory(tmp_path / "scores")
        ),
    }[command]

    def copy_run():
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(finished_run.path, run)

    @settings(max_examples=12, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def damage_and_run(data):
        copy_run()
        for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)):
            damage_file(run / name, data)
        run_in_process(arguments)

    copy_run()
    assert run_in_process(arguments) == ("error: " + STOPPED if command == "evaluate" else "")
    damage_and_run()
