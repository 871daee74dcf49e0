"""Triton is not in the environment. `make test-triton` alone collects these: pytest -m triton."""

from __future__ import annotations

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return None if config.getoption("markexpr") == "triton" else True
