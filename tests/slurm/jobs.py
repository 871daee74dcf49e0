"""Jobs of the scripts in slurm/ on the test cluster: submitting them as a user does, and reading their state."""

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
# The quickstart with few questions and short responses: 2 mini-batches a step.
TINY = [
    "--config-name=quickstart",
    "data.questions_per_step=4",
    "algorithm.mini_batch_questions=2",
    "generation.responses_per_question=4",
    "generation.max_response_length=32",
    "model.token_budget=512",
]
TRAIN = [*TINY, "evaluation.enabled=false", "algorithm.name=paced:Paced", "model.tensor_model_parallel_size=2"]
# The test cluster's nodes in place of the scripts'. An hour, so that SLURM warns of the end only when a test wants it.
HERE = ("--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "--time=60")


# The final states. Every other one (SIGNALING, COMPLETING, ...) is followed by another.
ENDS = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "PREEMPTED"}


@dataclass(frozen=True)
class Job:
    id: str
    slurm: Cluster
    run: Path
    log: Path

    def field(self, key: str) -> str:
        """A field of the job as SLURM shows it, such as JobState, Restarts, ExitCode."""
        match = re.search(rf"\b{key}=(\S+)", self.slurm.call("scontrol", "show", "job", self.id))
        assert match is not None
        return match[1]

    def has_ended(self) -> bool:
        return self.field("JobState") in ENDS

    def wait_for_end(self, seconds: float = START_S) -> str:
        """Wait for the job's end and return its final state."""
        wait_for(self.has_ended, seconds)
        return self.field("JobState")

    def wait_for_step(self, step: int = 1) -> None:
        """Wait until so many training steps are done."""
        metrics = self.run / "metrics.jsonl"

        def is_done() -> bool:
            assert not self.has_ended(), self.log.read_text()
            return metrics.exists() and len(metrics.read_text().splitlines()) >= step

        wait_for(is_done, START_S)

    def rank_pid(self, rank: int) -> int:
        """The process id of a rank."""
        return self._pids("0", f"n{rank // 2 + 1}")[str(rank)]

    def script_pid(self) -> int:
        """The process id of the batch script."""
        return self._pids("batch", "n1")["0"]

    def _pids(self, step: str, node: str) -> dict[str, int]:
        """Process ids of a job step's tasks on a node, by the number of the task."""
        lines = self.slurm.call("scontrol", "listpids", self.field("JobId"), node).splitlines()[1:]
        return {task: int(pid) for pid, _, job_step, _, task in map(str.split, lines) if job_step == step}


Submit = Callable[..., Job]


def submit(
    slurm: Cluster, run: Path, script: str, arguments: Sequence[str], *options: str, logs: Path, **variables: str
) -> Job:
    """Run `sbatch OPTIONS slurm/SCRIPT ARGUMENTS` in the root of the repository."""
    environment = slurm.environment | {"RUN": str(run), "PYTHONPATH": str(ROOT / "tests/slurm")} | variables
    command = ["sbatch", "--parsable", f"--output={logs}/%j.log", *HERE, *options, f"slurm/{script}", *arguments]
    number = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Job(number.strip(), slurm, run, logs / f"{number.strip()}.log")


def end_all(slurm: Cluster) -> None:
    """End all jobs of the cluster, and wait until they are gone."""
    slurm.call("scancel", "--full", "--signal=KILL", f"--user={os.getuid()}")
    slurm.call("scancel", f"--user={os.getuid()}")
    wait_for(lambda: not slurm.call("squeue", "--noheader"), seconds=60)
