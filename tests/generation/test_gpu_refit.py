"""Refits as on GPUs, by IPC and by broadcast, without one: real processes, and stand-ins that block as NCCL does
(stand_in_gpu.py). Nothing of it has run on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_gpu_engine
import pytest
import torch
from arithmetic import right, sampled
from stand_in_gpu import SharedMemory, SocketBroadcast
from torch import Tensor

from nemo_disco.generation.external import refit, replica, staging
from nemo_disco.generation.external.engine import ExternalEngine
from nemo_disco.runtime.errors import UserError

Start = Callable[..., ExternalEngine]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "IpcMemory", SharedMemory)
    monkeypatch.setattr(staging, "Broadcast", SocketBroadcast)
    monkeypatch.setattr(staging, "_GPU", "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.fixture
def colocated(start: Start) -> Start:
    return lambda *replicas, **options: start(*replicas, file=fake_gpu_engine.__file__, bucket_bytes=1, **options)


@pytest.fixture
def elsewhere(colocated: Start, there: str) -> Start:
    return lambda *replicas, **options: colocated(*replicas, host=there, **options)


def test_colocated_ranks_read_the_runs_slots(colocated: Start, tensors: dict[str, Tensor]) -> None:
    engine = colocated(fault="refit", at=5, how="kill")
    closed = SharedMemory.closed[0]
    for version in (0, 1):
        engine.update_weights(tensors.items, version)
        assert right(sampled(engine), tensors, version)
        for tensor in tensors.values():
            tensor.mul_(1.5)
    used = engine.replicas[0].staging
    assert used.kind == "ipc" and len(used.memories) == fake_gpu_engine.RANKS and used.slots == 2
    assert SharedMemory.closed[0] == closed + fake_gpu_engine.RANKS  # those of the process that was killed


def test_ranks_elsewhere_are_broadcast_to(elsewhere: Start, tensors: dict[str, Tensor]) -> None:
    engine = elsewhere(2)
    for version in (0, 1):
        engine.update_weights(tensors.items, version)
        assert right(sampled(engine), tensors, version)
        for tensor in tensors.values():
            tensor.mul_(1.5)
    assert {replica.staging.kind for replica in engine.replicas} == {"nccl"}


def test_a_refused_bucket_leaves_nobody_in_a_broadcast(elsewhere: Start, tensors: dict[str, Tensor]) -> None:
    """The one that is refused, and those that follow before the run has heard of it."""
    engine = elsewhere()
    engine.update_weights(tensors.items, 0)
    names = list(tensors)
    wrong = [(name, t.flatten() if name == names[3] and t.dim() > 1 else t) for name, t in tensors.items()]
    wrong[4] = ("extra.weight", tensors[names[4]])
    with pytest.raises(UserError, match="refit failed 3 times in a row: refit: "):
        engine.update_weights(lambda: wrong, 1)


def test_an_aborted_refit_is_followed_by_a_full_one(
    elsewhere: Start, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, flush, spoilt = elsewhere(), refit.Sender._flush, []

    def once(sender: refit.Sender) -> None:
        if sender._buckets == 4 and not spoilt:
            spoilt.append(sender._entries[0].update(shape=[1]))
        flush(sender)

    monkeypatch.setattr(refit.Sender, "_flush", once)
    engine.update_weights(tensors.items, 3)
    assert spoilt and right(sampled(engine), tensors, 3)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("where", "at", "how", "said"),
    [
        ("receive", 3, "kill", "ended|killed"),  # the run is in a broadcast, or about to be
        ("join", 0, "raise", "ended"),
        pytest.param("join", 0, "kill", "ended|killed", marks=SLOW),
        pytest.param("joined", 0, "kill", "ended|killed", marks=SLOW),
        pytest.param("receive", 0, "raise", "ended", marks=SLOW),
        pytest.param("refit", 5, "kill", "ended|killed", marks=SLOW),
        pytest.param("refit", 5, "raise", "the engine's own words", marks=SLOW),
        pytest.param("finish", 0, "raise", "the engine's own words", marks=SLOW),
    ],
)
def test_an_engine_that_fails_in_a_collective_does_not_take_the_run_along(
    where: str,
    at: int,
    how: str,
    said: str,
    elsewhere: Start,
    tensors: dict[str, Tensor],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    engine = elsewhere(fault=where, at=at, how=how)
    engine.update_weights(tensors.items, 2)
    assert (tmp_path / "once").exists() and right(sampled(engine), tensors, 2)
    assert any(word in caplog.text for word in said.split("|"))


def test_an_error_of_the_runs_own_broadcast_is_the_engines_loss(
    elsewhere: Start, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, broadcast, failed = elsewhere(), SocketBroadcast.__call__, []

    def once(this: SocketBroadcast, memory: Tensor) -> None:
        if not failed:
            failed.append(True)
            raise RuntimeError("ncclBroadcast failed with code 6")
        broadcast(this, memory)

    monkeypatch.setattr(SocketBroadcast, "__call__", once)
    engine.update_weights(tensors.items, 2)
    assert "replica 0 was lost in a collective: ncclBroadcast failed with code 6" in caplog.text
    assert right(sampled(engine), tensors, 2)


@pytest.mark.parametrize("where", ["receive", pytest.param("join", marks=SLOW)])
def test_an_engine_that_does_not_come_is_given_up(
    where: str, elsewhere: Start, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    engine = elsewhere(fault=where, how="hang")
    monkeypatch.setattr(replica, "SILENCE_S", 1.0)
    engine.update_weights(tensors.items, 2)
    assert "did not come to a collective in 1 s" in caplog.text
    assert right(sampled(engine), tensors, 2)
