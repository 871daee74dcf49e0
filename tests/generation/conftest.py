"""Engines in processes of their own whose engine is arithmetic: fake_engine.py, or a file like it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_engine
import pytest
from safetensors.torch import load_file
from tiny_models import model_config, save_model
from torch import Tensor

from nemo_disco.generation.external.engine import ExternalEngine
from nemo_disco.generation.external.replica import Place, Replica
from nemo_disco.policy import parallel


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_model(tmp_path_factory.mktemp("model"), "qwen2", tied=True)
    parallel.start(model_config(path))
    return path


@pytest.fixture
def tensors(model: Path) -> dict[str, Tensor]:
    found = load_file(model / "model.safetensors")
    found.pop("lm_head.weight", None)
    return found


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[Callable[..., ExternalEngine]]:
    """start(replicas, **options) -> the engine."""
    started: list[ExternalEngine] = []

    def build(
        replicas: int = 1,
        host: str | None = None,
        bucket_bytes: int = 1 << 20,
        file: str = fake_engine.__file__,
        **options: Any,
    ) -> ExternalEngine:
        settings = {"model": str(model), "dtype": "float32", "bucket_bytes": bucket_bytes, "options": options}
        options.setdefault("once", str(tmp_path / "once"))
        python = fake_engine.fake_python(tmp_path, file)
        places = [Place(python, tmp_path / f"{i}.log", (), host) for i in range(replicas)]
        started.append(ExternalEngine([Replica(f"replica {i}", place, settings) for i, place in enumerate(places)]))
        return started[-1]

    yield build
    for engine in started:
        engine.close()


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A host that ssh reaches: this one."""
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\nshift 3\nexec sh -c "$*"\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return "there"
