"""A SLURM on this machine for these tests. `make test-slurm` alone collects them: pytest -m slurm."""

from __future__ import annotations

import functools
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jobs
import pytest
from cluster import Cluster, cluster


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return None if config.getoption("markexpr") == "slurm" else True


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    # Whatever ends pytest ends the jobs.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Short, for a socket lies in it.
    with tempfile.TemporaryDirectory(prefix="slurm-") as directory, cluster(Path(directory) / "c") as running:
        yield running


@pytest.fixture
def submit(slurm: Cluster, tmp_path: Path) -> Iterator[jobs.Submit]:
    """submit(script, arguments, *sbatch options, **environment): a job whose run is tmp_path/run."""
    yield functools.partial(jobs.submit, slurm, tmp_path / "run", logs=tmp_path)
    jobs.end_all(slurm)
