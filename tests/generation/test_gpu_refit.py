"""Refits by CUDA IPC and by NCCL broadcast without a GPU: real processes, and replacements that block as NCCL does
(stand_in_gpu.py). None of this has run on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_gpu_engine
import pytest
import torch
from arithmetic import come_from, sample
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
def start_colocated(start: Start) -> Start:
    """start_colocated(replicas, **options) starts an engine of two ranks that receive weights by CUDA IPC."""
    return lambda *replicas, **options: start(*replicas, file=fake_gpu_engine.__file__, bucket_bytes=1, **options)


@pytest.fixture
def start_remote(start_colocated: Start, other_host: str) -> Start:
    """start_remote(replicas, **options) starts the same engine on another host, where it receives weights by NCCL."""
    return lambda *replicas, **options: start_colocated(*replicas, host=other_host, **options)


def test_colocated_ranks_read_the_slots_that_the_run_writes(start_colocated: Start, tensors: dict[str, Tensor]) -> None:
    engine = start_colocated(fault="refit", at=5, how="kill")
    closed_before = SharedMemory.closed[0]
    for version in (0, 1):
        engine.update_weights(tensors.items, version)
        assert come_from(sample(engine), tensors, version)
        for tensor in tensors.values():
            tensor.mul_(1.5)
    slots = engine.replicas[0].staging
    assert slots.kind == "ipc" and len(slots.memories) == fake_gpu_engine.RANKS and slots.slots == 2
    assert SharedMemory.closed[0] == closed_before + fake_gpu_engine.RANKS  # those of the killed process


def test_ranks_on_other_machines_receive_a_broadcast(start_remote: Start, tensors: dict[str, Tensor]) -> None:
    engine = start_remote(2)
    for version in (0, 1):
        engine.update_weights(tensors.items, version)
        assert come_from(sample(engine), tensors, version)
        for tensor in tensors.values():
            tensor.mul_(1.5)
    assert {replica.staging.kind for replica in engine.replicas} == {"nccl"}


def test_a_refused_bucket_leaves_no_rank_in_a_broadcast(start_remote: Start, tensors: dict[str, Tensor]) -> None:
    """The run sends more buckets before it receives the refusal; no rank may wait for their broadcasts either."""
    engine = start_remote()
    engine.update_weights(tensors.items, 0)
    names = list(tensors)
    wrong = [(name, t.flatten() if name == names[3] and t.dim() > 1 else t) for name, t in tensors.items()]
    wrong[4] = ("extra.weight", tensors[names[4]])
    with pytest.raises(UserError, match="refit failed 3 times in a row: refit: "):
        engine.update_weights(lambda: wrong, 1)


def test_an_aborted_refit_is_followed_by_a_full_one(
    start_remote: Start, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, flush, faults = start_remote(), refit.Sender._flush, []

    def flush_with_one_fault(sender: refit.Sender) -> None:
        if sender._buckets == 4 and not faults:
            faults.append(sender._entries[0].update(shape=[1]))
        flush(sender)

    monkeypatch.setattr(refit.Sender, "_flush", flush_with_one_fault)
    engine.update_weights(tensors.items, 3)
    assert faults and come_from(sample(engine), tensors, 3)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("where", "at", "how", "messages"),
    [
        ("receive", 3, "kill", "ended|killed"),  # the run is in a broadcast, or about to be
        ("join", 0, "raise", "ended"),
        pytest.param("join", 0, "kill", "ended|killed", marks=SLOW),
        pytest.param("joined", 0, "kill", "ended|killed", marks=SLOW),
        pytest.param("receive", 0, "raise", "ended", marks=SLOW),
        pytest.param("refit", 5, "kill", "ended|killed", marks=SLOW),
        pytest.param("refit", 5, "raise", "error of the fake engine", marks=SLOW),
        pytest.param("finish", 0, "raise", "error of the fake engine", marks=SLOW),
    ],
)
def test_an_engine_that_fails_in_a_collective_does_not_end_the_run(
    where: str,
    at: int,
    how: str,
    messages: str,
    start_remote: Start,
    tensors: dict[str, Tensor],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    engine = start_remote(fault=where, at=at, how=how)
    engine.update_weights(tensors.items, 2)
    assert (tmp_path / "once").exists() and come_from(sample(engine), tensors, 2)
    assert any(word in caplog.text for word in messages.split("|"))


def test_after_an_error_in_the_runs_own_broadcast_the_replica_is_started_again(
    start_remote: Start, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, broadcast, errors = start_remote(), SocketBroadcast.__call__, []

    def broadcast_after_one_error(this: SocketBroadcast, memory: Tensor) -> None:
        if not errors:
            errors.append(RuntimeError("ncclBroadcast failed with code 6"))
            raise errors[0]
        broadcast(this, memory)

    monkeypatch.setattr(SocketBroadcast, "__call__", broadcast_after_one_error)
    engine.update_weights(tensors.items, 2)
    assert "replica 0 was lost in a collective: ncclBroadcast failed with code 6" in caplog.text
    assert come_from(sample(engine), tensors, 2)


@pytest.mark.parametrize("where", ["receive", pytest.param("join", marks=SLOW)])
def test_an_engine_that_does_not_join_a_collective_is_started_again(
    where: str, start_remote: Start, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    engine = start_remote(fault=where, how="hang")
    monkeypatch.setattr(replica, "SILENCE_S", 1.0)
    engine.update_weights(tensors.items, 2)
    assert "did not come to a collective in 1 s" in caplog.text
    assert come_from(sample(engine), tensors, 2)
