"""Only `make test-triton` collects these tests (pytest -m triton), since Triton is not in the environment."""

from __future__ import annotations

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return None if config.getoption("markexpr") == "triton" else True
