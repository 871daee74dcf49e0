"""A job of slurm/'s scripts on the test cluster: submitted as a user does, watched, and asked how it ended."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster import Cluster, wait_for

ROOT = Path(__file__).resolve().parents[2]
START_S = 300  # four processes import torch on two cores
# The quickstart's model and questions, and little of them: 2 mini-batches a step.
TINY = [
    "--config-name=quickstart",
    "data.questions_per_step=4",
    "algorithm.mini_batch_questions=2",
    "generation.responses_per_question=4",
    "generation.max_response_length=32",
    "model.token_budget=512",
]
TRAIN = [*TINY, "evaluation.enabled=false", "algorithm.name=paced:Paced", "model.tensor_model_parallel_size=2"]
# This machine's nodes in place of the script's; an hour, so that the warning of its end comes when a test wants it.
HERE = ("--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "--time=60")


# Of all others (SIGNALING, COMPLETING, ...) another state follows.
ENDS = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "PREEMPTED"}


@dataclass(frozen=True)
class Job:
    id: str
    slurm: Cluster
    run: Path
    log: Path

    def shown(self, key: str) -> str:
        """SLURM's fields of the job, such as JobState, Restarts, ExitCode."""
        found = re.search(rf"\b{key}=(\S+)", self.slurm.call("scontrol", "show", "job", self.id))
        assert found is not None
        return found[1]

    def ended(self) -> bool:
        return self.shown("JobState") in ENDS

    def state(self, seconds: float = START_S) -> str:
        """Wait for the job's end; returns its state."""
        wait_for(self.ended, seconds)
        return self.shown("JobState")

    def wait_for_step(self, step: int = 1) -> None:
        """Until so many training steps are done."""
        metrics = self.run / "metrics.jsonl"

        def done() -> bool:
            assert not self.ended(), self.log.read_text()
            return metrics.exists() and len(metrics.read_text().splitlines()) >= step

        wait_for(done, START_S)

    def process(self, rank: int) -> int:
        """The process of a rank."""
        return self._pids("0", f"n{rank // 2 + 1}")[str(rank)]

    def batch_script(self) -> int:
        """The process of the script."""
        return self._pids("batch", "n1")["0"]

    def _pids(self, step: str, node: str) -> dict[str, int]:
        listed = self.slurm.call("scontrol", "listpids", self.shown("JobId"), node).splitlines()[1:]
        return {task: int(pid) for pid, _, its_step, _, task in map(str.split, listed) if its_step == step}


Submit = Callable[..., Job]


def submit(
    slurm: Cluster, run: Path, script: str, arguments: Sequence[str], *options: str, logs: Path, **variables: str
) -> Job:
    """sbatch OPTIONS slurm/SCRIPT ARGUMENTS, from the root of the repository."""
    environment = slurm.environment | {"RUN": str(run), "PYTHONPATH": str(ROOT / "tests/slurm")} | variables
    command = ["sbatch", "--parsable", f"--output={logs}/%j.log", *HERE, *options, f"slurm/{script}", *arguments]
    number = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Job(number.strip(), slurm, run, logs / f"{number.strip()}.log")


def end_all(slurm: Cluster) -> None:
    slurm.call("scancel", "--full", "--signal=KILL", f"--user={os.getuid()}")
    slurm.call("scancel", f"--user={os.getuid()}")
    wait_for(lambda: not slurm.call("squeue", "--noheader"), seconds=60)
