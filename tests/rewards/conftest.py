"""The math grader that the tests of rewards share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nemo_disco.rewards import MathGrader


@pytest.fixture(scope="session")
def grader() -> Iterator[MathGrader]:
    """The grader of all tests that do not try to break it; its time limit is far above what an honest answer needs."""
    with MathGrader(timeout=30.0, workers=2) as grader:
        yield grader
