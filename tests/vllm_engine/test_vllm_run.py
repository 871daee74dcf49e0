"""Commands on the quickstart with generation=vllm: verify, and training whose engine is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vllm
REPO = Path(__file__).parents[2]
SMALL = (
    "--config-name=quickstart",
    "generation=vllm",
    f"generation.python={REPO}/.venv-vllm/bin/python",
    "data.questions_per_step=8",
    "algorithm.mini_batch_questions=4",
    "generation.responses_per_question=4",
    "exp_manager.tensorboard=false",
    "evaluation.max_questions=8",
    "evaluation.samples=2",
)


# The engine samples the next step's responses while the policy trains.
AHEAD = (
    "generation.colocated=false",
    "generation.asynchronous=true",
    "algorithm.off_policy.kind=truncated_importance_sampling",
)


def start(command: str, *overrides: str) -> subprocess.Popen[str]:
    environment = {n: v for n, v in os.environ.items() if n not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "nemo_disco", command, *SMALL, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=REPO,
    )


def wait_for_success(process: subprocess.Popen[str]) -> str:
    """Wait until the command ends with exit code 0; return its output."""
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out
    return out


def steps(run: Path) -> list[dict[str, Any]]:
    """The metrics of each step so far."""
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def worker_pids(run: Path) -> list[int]:
    """The process ids of a run's workers, which are recognised by the logs that they write."""
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            out = os.readlink(process / "fd/1")
            if out.startswith(str(run / "engines")) and "rollout_worker" in (process / "cmdline").read_text():
                pids.append(int(process.name))
        except OSError:
            continue
    return pids


def test_verify_passes() -> None:
    out = wait_for_success(start("verify", "trainer.devices=1", "verify.max_mismatch=1.001", "verify.max_kl=1e-6"))
    assert "mismatch mean e^|d| 1.0000" in out


def test_verify_names_fp8_rollouts_and_training_corrects_for_them(tmp_path: Path) -> None:
    fp8 = ("trainer.devices=1", "trainer.precision=bf16", "generation.quantization=fp8_per_channel")
    verify = start("verify", *fp8)
    out, _ = verify.communicate(timeout=400)
    assert verify.returncode == 2 and "likely cause: generation.quantization=fp8_per_channel" in out
    run = tmp_path / "run"
    correction = "algorithm.off_policy.kind=truncated_importance_sampling"
    limits = ("verify.max_mismatch=1.3", "verify.max_kl=0.05")
    options = (*fp8, correction, *limits, f"exp_manager.explicit_log_dir={run}", "trainer.max_steps=2")
    wait_for_success(start("train", *options))
    for step in steps(run):
        assert 1e-3 < step["mismatch/mean_abs"] < 0.2 and step["mini_batches/skipped"] == 0
        assert 0.8 < step["off_policy/factor_mean"] < 1.2
    assert [step["step"] for step in steps(run)] == [1, 2]


@pytest.mark.parametrize("overrides", [(), AHEAD], ids=["in turn", "ahead"])
def test_a_run_on_two_ranks_survives_the_death_of_its_engine(overrides: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start("train", f"exp_manager.explicit_log_dir={run}", "trainer.max_steps=3", *overrides)
    while len(steps(run)) < 1:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    (engine,) = worker_pids(run)  # rank 0 drives it
    os.kill(engine, signal.SIGKILL)
    out = wait_for_success(process)
    assert "was killed by SIGKILL" in out and "trying again with all weights given anew" in out
    assert [step["step"] for step in steps(run)] == [1, 2, 3]
    for step in steps(run):
        assert step["time/refit"] > 0
        assert step["mismatch/max_abs"] < 1e-3 or step["staleness/max"] == 1
    if overrides:  # the third step's responses come from the killed engine and from its successor
        assert [step["staleness/max"] for step in steps(run)[:2]] == [0, 1]
        assert [step["staleness/mean"] for step in steps(run)[:2]] == [0, 1]
        assert 0 <= steps(run)[2]["staleness/mean"] <= 1
        assert all(0.9 < step["off_policy/factor_mean"] < 1.1 for step in steps(run))
    else:
        assert not any(step["staleness/max"] for step in steps(run))
    assert not worker_pids(run)
    assert (run / "export" / "model.safetensors").exists()
