"""Only `make test-sinks` collects these tests: pytest -m sinks, in an environment that has wandb and mlflow."""

from __future__ import annotations

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return None if config.getoption("markexpr") == "sinks" else True
