"""Only `make test-transformers4` collects these tests: pytest -m transformers4, in .venv-transformers4."""

from __future__ import annotations

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return None if config.getoption("markexpr") == "transformers4" else True
