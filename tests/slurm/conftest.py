"""A SLURM on this machine for these tests. Only `make test-slurm` collects them: pytest -m slurm."""

from __future__ import annotations

import functools
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jobs
import pytest
from cluster import Cluster, run_cluster


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return None if config.getoption("markexpr") == "slurm" else True


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    # SIGTERM raises KeyboardInterrupt, so that the jobs end with pytest.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # A short path, since sockets lie in the directory.
    with tempfile.TemporaryDirectory(prefix="slurm-") as directory, run_cluster(Path(directory) / "c") as cluster:
        yield cluster


@pytest.fixture
def submit(slurm: Cluster, tmp_path: Path) -> Iterator[jobs.Submit]:
    """submit(script, arguments, *sbatch_options, **environment) submits a job whose run directory is tmp_path/run."""
    yield functools.partial(jobs.submit, slurm, tmp_path / "run", logs=tmp_path)
    jobs.end_all(slurm)
