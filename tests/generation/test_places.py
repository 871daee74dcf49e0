"""Which GPUs a replica is given: those that this process may use, by CUDA's own names."""

from __future__ import annotations

import pytest

from nemo_disco.config.compose import compose
from nemo_disco.generation import build
from nemo_disco.generation.build import _places
from nemo_disco.runtime.errors import UserError


@pytest.fixture
def places(monkeypatch, tmp_path):
    """The GPUs of each replica, where this process sees the devices that CUDA_VISIBLE_DEVICES names."""

    def gpus(visible: str | None, *overrides: str, trainers: int = 1, count: int = 0) -> list[list[str]]:
        monkeypatch.setattr(build.torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(
            build.torch.cuda, "device_count", lambda: count or (len(visible.split(",")) if visible else 8)
        )
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(trainers))
        config = compose("quickstart", ["generation=vllm", "generation.python=python3", *overrides])
        return [list(place.gpus) for place in _places(config.generation, tmp_path)]

    return gpus


def test_a_replicas_number_goes_through_this_processs_list(places):
    two = ["generation.replicas=2"]
    assert places("2,3", *two) == [["2"], ["3"]]
    assert places("GPU-a,GPU-b", "generation.tensor_parallel_size=2") == [["GPU-a", "GPU-b"]]
    assert places("4,5,6,7", *two, "generation.colocated=false", trainers=2) == [["6"], ["7"]]
    assert places("2,-1,3", count=1) == [["2"]]  # CUDA reads no further than the -1
    assert places(None, *two, "generation.colocated=false", trainers=4) == [["4"], ["5"]]
    assert places("2,3", "generation.nodes=[other]") == [["0"]]  # another machine counts for itself


def test_gpus_that_are_not_there_are_refused_by_number(places):
    with pytest.raises(UserError, match=r"GPUs 1 to 1 .* sees 1 \(CUDA_VISIBLE_DEVICES=3\)"):
        places("3", "generation.replicas=2")
    with pytest.raises(UserError, match=r"sees 1 \(CUDA_VISIBLE_DEVICES=2,-1,3\)"):
        places("2,-1,3", "generation.replicas=2", count=1)
    with pytest.raises(UserError, match=r"those after the training processes'.*sees 8"):
        places(None, "generation.colocated=false", trainers=8)
