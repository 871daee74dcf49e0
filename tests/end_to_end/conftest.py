"""A server of commands, and two runs that every module may look at."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from commands import PAPER_DATA, WHOLE, Commands, Finished, at

# Needs the papers' files, which no checkout has.
collect_ignore = [] if PAPER_DATA.is_dir() else ["test_paper_questions.py"]


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    running = Commands(tmp_path_factory.mktemp("commands"))
    yield running
    running.close()


@pytest.fixture(scope="session", params=[1, 2], ids=["DP1", "DP2"])
def finished(request: pytest.FixtureRequest, commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The command line as a user starts it; with two devices, it starts its ranks itself."""
    path = tmp_path_factory.mktemp("finished") / "run"
    started = commands.start_anew("train", *WHOLE, at(path), devices=request.param)
    return Finished(request.param, path, started.wait().ok())
