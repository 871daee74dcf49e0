"""Fixtures: a runner of commands, and two finished runs that every module may read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from commands import PAPER_DATA, WHOLE_RUN, Commands, FinishedRun, run_directory

# That module needs the papers' files, which are not in the repository.
collect_ignore = [] if PAPER_DATA.is_dir() else ["test_paper_questions.py"]


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    runner = Commands(tmp_path_factory.mktemp("commands"))
    yield runner
    runner.close()


@pytest.fixture(scope="session", params=[1, 2], ids=["DP1", "DP2"])
def finished_run(
    request: pytest.FixtureRequest, commands: Commands, tmp_path_factory: pytest.TempPathFactory
) -> FinishedRun:
    """A run by the command line as a user starts it; with two devices, the command starts its ranks itself."""
    path = tmp_path_factory.mktemp("finished") / "run"
    command = commands.start_anew("train", *WHOLE_RUN, run_directory(path), devices=request.param)
    return FinishedRun(request.param, path, command.wait().ok())
