"""Fixtures that start external engines whose workers run fake_engine.py, or a file like it."""

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
    """The directory of a tiny Qwen2 with tied embeddings."""
    path = save_model(tmp_path_factory.mktemp("model"), "qwen2", tied=True)
    parallel.start(model_config(path))
    return path


@pytest.fixture
def tensors(model: Path) -> dict[str, Tensor]:
    """The model's weights by name, without the output layer that is tied to the embeddings."""
    weights = load_file(model / "model.safetensors")
    weights.pop("lm_head.weight", None)
    return weights


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[Callable[..., ExternalEngine]]:
    """start(replicas, **options) starts an engine that has no weights yet; the options are FakeEngine's."""
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
def other_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of another host; `ssh` to it runs the command on this machine."""
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\nshift 3\nexec sh -c "$*"\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return "other"
