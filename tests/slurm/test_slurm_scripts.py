"""Shellcheck of the scripts, and their options for the container runtime Pyxis, which itself is not on this machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from jobs import ROOT

pytestmark = pytest.mark.slurm
SCRIPTS = sorted(path for path in (ROOT / "slurm").iterdir() if path.suffix in (".sh", ".sbatch"))


def test_shellcheck_has_nothing_to_say() -> None:
    process = subprocess.run(["shellcheck", "--external-sources", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (0, "")


@pytest.fixture
def srun_line(tmp_path: Path):
    """srun_line(script, **environment) runs a batch script with a fake srun, and returns the arguments of that srun."""
    fake = tmp_path / "bin" / "srun"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/words\n')
    fake.chmod(0o755)
    batch = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "name",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_NTASKS": "8",
        "RUN": str(tmp_path / "run"),
        "PATH": f"{fake.parent}:{os.environ['PATH']}",
    }

    def call(script: str, **environment: str) -> list[str]:
        subprocess.run(["bash", f"slurm/{script}", "seed=1"], cwd=ROOT, env=os.environ | batch | environment)
        return (tmp_path / "words").read_text().splitlines()

    return call


@pytest.mark.parametrize("script", ["train_one_node.sbatch", "train_multi_node.sbatch", "evaluate.sbatch"])
def test_pyxis_is_asked_for_the_image_with_the_runs_directory_in_it(srun_line, tmp_path, script) -> None:
    words = srun_line(script, CONTAINER="registry#image:tag", MOUNTS="/models:/models:ro")
    run = tmp_path / "run"
    assert "--container-image=registry#image:tag" in words
    assert f"--container-workdir={ROOT}" in words
    assert f"--container-mounts={ROOT}:{ROOT},{run}:{run},/models:/models:ro" in words
    command = script.partition("_")[0].removesuffix(".sbatch")
    program = words.index("python")
    assert words[program : program + 4] == ["python", "-m", "nemo_disco", command]
    assert words[-2:] == [f"exp_manager.explicit_log_dir={run}", "seed=1"]


def test_without_an_image_there_is_no_container(srun_line) -> None:
    words = srun_line("train_one_node.sbatch", SLURM_CPUS_PER_TASK="4")
    assert not [word for word in words if "container" in word]
    assert "--kill-on-bad-exit=1" in words and "--cpus-per-task=4" in words
