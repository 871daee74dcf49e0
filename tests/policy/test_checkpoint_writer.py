"""Saving in the background: what is written is the step's own, training goes on, and no failure goes unsaid."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import full_disk
import pytest
import torch
from models import model_config, save_model
from training import fingerprint, train

from nemo_disco.policy import checkpoint, parallel
from nemo_disco.policy import checkpoint_files as files
from nemo_disco.policy.checkpoint_writer import CheckpointWriter
from nemo_disco.policy.policy import Policy
from nemo_disco.runtime.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "qwen2", tied=True)


def build(path: Path, dtype: torch.dtype = torch.float32) -> Policy:
    config = model_config(path)
    parallel.start(config)
    return Policy(config, dtype=dtype, total_optimizer_steps=20)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A disk on which nothing is written until this is set."""
    ready = threading.Event()
    theirs = files.begin

    def begin(*args: Any) -> Path:
        assert ready.wait(60)
        return theirs(*args)

    monkeypatch.setattr(files, "begin", begin)
    yield ready
    ready.set()


def fails(error: Exception) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise error

    return fail


def save_and_fail(policy: Policy, directory: Path) -> None:
    with CheckpointWriter() as writer:
        writer.save(policy, directory, 1, {}, keep=1)
        raise KeyError("training")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_checkpoint_is_of_its_step_whatever_training_does_meanwhile(
    model: Path, tmp_path: Path, disk: threading.Event, dtype: torch.dtype
) -> None:
    policy = build(model, dtype)
    train(policy, range(2))
    bits = fingerprint(policy)
    with CheckpointWriter() as writer:
        writer.save(policy, tmp_path, 2, {"step": 2}, keep=1)
        draws = torch.rand(5)
        train(policy, range(2, 4))
        assert not writer.done and checkpoint.latest(tmp_path) is None
        disk.set()
    resumed = build(model, dtype)
    assert checkpoint.load_latest(resumed, tmp_path) == (2, {"step": 2})
    assert fingerprint(resumed) == bits
    assert torch.equal(torch.rand(5), draws)
    train(resumed, range(2, 4))
    assert fingerprint(resumed) == fingerprint(policy)


def test_the_next_save_waits_for_the_one_before(model: Path, tmp_path: Path, disk: threading.Event) -> None:
    policy = build(model)
    with CheckpointWriter() as writer:
        writer.save(policy, tmp_path, 1, {}, keep=1)
        threading.Timer(0.2, disk.set).start()
        writer.save(policy, tmp_path, 2, {}, keep=1)
        assert 1 in files.finished(tmp_path)
    assert list(files.finished(tmp_path)) == [2]


def test_a_full_disk_is_said_with_the_directory_and_the_one_before_stays(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = build(model)
    checkpoint.save(policy, tmp_path, 1, {}, keep=1)
    monkeypatch.setattr(files, "commit", fails(OSError("No space left on device")))
    writer = CheckpointWriter()
    writer.save(policy, tmp_path, 2, {}, keep=1)
    while not writer.done:
        pass
    assert writer.failed
    with pytest.raises(UserError, match=rf"{tmp_path}/step_2 was not written: No space left on device"):
        writer.save(policy, tmp_path, 3, {}, keep=1)
    assert not writer.failed, "said once"
    assert checkpoint.load_latest(policy, tmp_path) == (1, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


def test_a_shard_that_cannot_be_written_is_said_with_the_directory(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemo_disco.policy.checkpoint_storage._Writer.write_data", fails(OSError("read-only")))
    with pytest.raises(UserError, match=rf"{tmp_path}/step_1 was not written: read-only"):
        checkpoint.save(build(model), tmp_path, 1, {}, keep=1)


def test_a_full_disk_is_said_with_the_directory(model: Path, tmp_path: Path) -> None:
    """A real one: what torch's writer makes of it is no OSError."""
    policy, place = build(model), tmp_path / "disk"
    with full_disk.small(place, "512k"):
        with pytest.raises(UserError, match=rf"{place}/c/step_1 was not written: .*No space left on device") as raised:
            checkpoint.save(policy, place / "c", 1, {}, keep=1)
        assert "\n" not in str(raised.value) and list(files.finished(place / "c")) == []


def test_a_defect_keeps_its_traceback(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cause = ZeroDivisionError("a defect")
    monkeypatch.setattr(files, "describe", fails(cause))
    with pytest.raises(RuntimeError, match=rf"{tmp_path}/step_1 was not written: a defect") as raised:
        checkpoint.save(build(model), tmp_path, 1, {}, keep=1)
    assert raised.value.__cause__ is cause


def test_a_run_that_fails_still_finishes_its_checkpoint(model: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="training"):
        save_and_fail(build(model), tmp_path)
    assert list(files.finished(tmp_path)) == [1]


def test_what_ended_the_run_is_raised_before_a_failed_save(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "commit", fails(OSError("No space left on device")))
    with pytest.raises(KeyError, match="training"):
        save_and_fail(build(model), tmp_path)
    assert caplog.record_tuples[-1][1] == logging.ERROR
    assert f"{tmp_path}/step_1 was not written: No space left on device" in caplog.text
