"""`make test-transformers4` alone collects these: pytest -m transformers4, with transformers 4 beside."""

from __future__ import annotations

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return None if config.getoption("markexpr") == "transformers4" else True
