"""The GPUs of each replica: a share of those that this process may use, by CUDA's own names."""

from __future__ import annotations

import pytest

from nemo_disco.config.compose import compose
from nemo_disco.generation import build
from nemo_disco.generation.build import _places
from nemo_disco.runtime.errors import UserError


@pytest.fixture
def places(monkeypatch, tmp_path):
    """places(visible, *overrides) returns each replica's GPUs. visible: CUDA_VISIBLE_DEVICES of this process; trainers:
    training processes on this machine; count: GPUs that CUDA reports, if not all of `visible`."""

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


def test_gpus_are_counted_in_this_processs_visible_devices(places):
    two = ["generation.replicas=2"]
    assert places("2,3", *two) == [["2"], ["3"]]
    assert places("GPU-a,GPU-b", "generation.tensor_parallel_size=2") == [["GPU-a", "GPU-b"]]
    assert places("4,5,6,7", *two, "generation.colocated=false", trainers=2) == [["6"], ["7"]]
    assert places("2,-1,3", count=1) == [["2"]]  # CUDA ignores the list from the -1 on
    assert places(None, *two, "generation.colocated=false", trainers=4) == [["4"], ["5"]]
    assert places("2,3", "generation.nodes=[other]") == [["0"]]  # another machine numbers its GPUs from 0


def test_a_replica_with_more_gpus_than_the_node_has_is_refused(places):
    with pytest.raises(UserError, match=r"GPUs 1 to 1 .* sees 1 \(CUDA_VISIBLE_DEVICES=3\)"):
        places("3", "generation.replicas=2")
    with pytest.raises(UserError, match=r"sees 1 \(CUDA_VISIBLE_DEVICES=2,-1,3\)"):
        places("2,-1,3", "generation.replicas=2", count=1)
    with pytest.raises(UserError, match=r"those after the training processes'.*sees 8"):
        places(None, "generation.colocated=false", trainers=8)
