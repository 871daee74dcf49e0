"""However a run's files are damaged, the command that reads them does its work or ends in one line: `main`, in-process,
with a policy that was built before."""

from __future__ import annotations

import contextlib
import shutil

import pytest
import torch.distributed as dist
from commands import WHOLE, at
from damage import spoil
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from in_process import ends_well

from nemo_disco.algorithms.agreement import Agreement
from nemo_disco.algorithms.trainer import Trainer
from nemo_disco.commands import components
from nemo_disco.config.compose import load_run_config
from nemo_disco.data.tokenizer import load_tokenizer
from nemo_disco.policy import parallel
from nemo_disco.runtime.errors import UserError

BUILT = "here the model would be built"


@pytest.fixture
def _built(monkeypatch, finished):
    """The commands' policy, which is built once; they train no step, and sample nothing."""

    def stop(*_, **__):
        raise UserError(BUILT)

    config = load_run_config(finished.path / "config.yaml")
    parallel.start(config.model, config.seed)
    policy = components.build_policy(config, load_tokenizer(config.model.path, False))
    monkeypatch.setattr(components, "process_groups", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(components, "build_policy", lambda *_, **__: policy)
    monkeypatch.setattr(Agreement, "check_engine", stop)  # `evaluate`, once the weights are there
    monkeypatch.setattr(Trainer, "train_step", stop)
    yield
    if dist.is_initialized():
        parallel.stop()


@pytest.mark.usefixtures("_built")
@pytest.mark.parametrize("finished", [1], indirect=True, ids=["DP1"])
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_damaged_run_is_used_or_refused_in_one_line(command, finished, commands, tmp_path):
    run = tmp_path / "run"
    names = sorted(str(path.relative_to(finished.path)) for path in finished.path.rglob("*") if path.is_file())
    names = [name for name in names if not name.startswith(("tensorboard", "checkpoints/step_2", "export"))]
    arguments = {
        "train": commands.arguments("train", "trainer.devices=1", *WHOLE, at(run)),
        "evaluate": commands.arguments("evaluate", "trainer.devices=1", f"model.path={run}", at(tmp_path / "scores")),
    }[command]

    def fresh():
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(finished.path, run)

    @settings(max_examples=12, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def damaged(data):
        fresh()
        for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)):
            spoil(run / name, data)
        ends_well(arguments)

    fresh()
    assert ends_well(arguments) == ("error: " + BUILT if command == "evaluate" else "")
    damaged()
