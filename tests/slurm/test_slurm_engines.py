"""Rollout engines on a node of their own, started by srun from the training ranks' node. The engine is a fake that
computes its responses by arithmetic; everything else is real."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, wait_for
from fake_engine import ANY_MISMATCH, fake_python
from jobs import HERE, ROOT, TRAIN, Job, Submit

from nemo_disco.config.paths import packaged_directory

pytestmark = pytest.mark.slurm
COIN = "def coin(response, answer):\n    return float(len(response) % 2)\n"
RESPONSES = 16
MODEL = packaged_directory("assets") / "quickstart/model"


def submit_training(submit: Submit, tmp_path: Path, **options: Any) -> Job:
    """Submit a job that trains for ever on n1, with a fake engine of these options on n2."""
    (tmp_path / "coins.py").write_text(COIN)
    options |= {"settings_file": str(tmp_path / "settings.jsonl"), "once": str(tmp_path / "once")}
    engine_options = ", ".join(f"{name}: {value!r}" for name, value in options.items())
    arguments = [
        *TRAIN,
        "generation=vllm",
        *ANY_MISMATCH,
        f"generation.python={fake_python(tmp_path)}",
        f"generation.options={{{engine_options}}}",
        "reward.verifier=coins:coin",
        "reward.require_think=false",
        "trainer.max_steps=1000",
    ]
    path = {"PYTHONPATH": f"{ROOT}/tests/slurm:{tmp_path}"}
    return submit("train_multi_node.sbatch", arguments, "--nodes=2", ENGINE_NODES="1", **path)


def read_engine_settings(tmp_path: Path) -> list[dict[str, Any]]:
    """The process id and node of each engine process, with the settings that it received."""
    file = tmp_path / "settings.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def list_command_lines() -> list[str]:
    """The command lines of all processes of this machine."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(file.read_text().replace("\0", " "))
        except OSError:  # the process ended meanwhile
            continue
    return lines


def test_an_engine_on_the_other_node_serves_dies_and_outlives_a_request_to_stop(submit: Submit, tmp_path: Path) -> None:
    job = submit_training(submit, tmp_path, fault="generate", call=2, at=5, how="kill")
    job.wait_for_step(4)
    arguments, engines = list_command_lines(), read_engine_settings(tmp_path)
    assert [engine["node"] for engine in engines] == ["n2", "n2"]
    steps = [line for line in arguments if f"{os.sep}python -m rollout_worker" in line]
    assert any(line.startswith("srun ") for line in steps)
    for engine in engines:
        assert engine["remote"] and isinstance(engine["address"], list)
        assert not [line for line in arguments if engine["secret"] in line]
    log = (job.run / "engines/n2-0.log").read_text()
    counts = [int(count) for count in re.findall(r"asked for (\d+)", log)]
    assert counts[:4] == [RESPONSES, RESPONSES, RESPONSES - 5, RESPONSES]  # answered prompts are not sampled again
    run_log = (job.run / "logs/latest/rank_0.log").read_text()
    assert re.search(r"generate: engine vllm, replica n2-0 .*; trying again with all weights given anew", run_log)
    job.slurm.call("scancel", "--signal=USR1", job.id)  # every process of every step
    assert job.wait_for_end() == "COMPLETED", job.log.read_text()
    assert read_engine_settings(tmp_path) == engines
    assert not [engine["pid"] for engine in engines if is_alive(engine["pid"])]


def test_no_engine_outlives_a_run_that_is_killed(submit: Submit, tmp_path: Path) -> None:
    job = submit_training(submit, tmp_path, slow=60)
    wait_for(lambda: "asked for" in _text(job.run / "engines/n2-0.log"), 300)
    (engine,) = read_engine_settings(tmp_path)
    assert engine["node"] == "n2" and is_alive(engine["pid"])
    os.kill(job.rank_pid(0), signal.SIGKILL)
    wait_for(lambda: not is_alive(engine["pid"]), 10)
    assert job.wait_for_end(60) == "FAILED"


@pytest.mark.usefixtures("submit")  # the fixture ends the jobs
@pytest.mark.parametrize("how", ["the run is killed", "the engine hangs"])
def test_an_engine_ends_though_the_job_goes_on(how: str, slurm: Cluster, tmp_path: Path) -> None:
    script = [ROOT / "tests/slurm/minimal_run.py", "n2", fake_python(tmp_path), MODEL, tmp_path]
    run = f"echo $$ > {tmp_path}/pid; exec {ROOT}/.venv/bin/python {' '.join(map(str, script))}"
    command = f"srun --nodes=1 --ntasks=1 --nodelist=n1 sh -c '{run}'; sleep 600"
    environment = slurm.environment | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        ["sbatch", *HERE, "--nodes=2", f"--output={tmp_path}/job.log", f"--wrap={command}"],
        env=environment,
        cwd=ROOT,
        check=True,
    )
    wait_for(lambda: _text(tmp_path / "ready") == "inline", 120)
    (engine,) = read_engine_settings(tmp_path)
    if how == "the engine hangs":
        os.kill(engine["pid"], signal.SIGSTOP)
        (tmp_path / "end").touch()
    else:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    wait_for(lambda: not is_alive(engine["pid"]), 30)
    assert slurm.call("squeue", "--noheader", "--format=%T") == "RUNNING"


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""
