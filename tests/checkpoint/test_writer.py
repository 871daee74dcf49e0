"""Saves in the background: the checkpoint is that of its step though training goes on, and every failure is raised."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import full_disk
import pytest
import torch
from tiny_models import model_config, save_model
from training import fingerprint, train

from nemo_disco import checkpoint
from nemo_disco.checkpoint import files
from nemo_disco.checkpoint import storage as checkpoint_storage
from nemo_disco.checkpoint import writer as checkpoint_writer
from nemo_disco.checkpoint.writer import CheckpointWriter
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy
from nemo_disco.policy.reference import Reference
from nemo_disco.runtime import host
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
    """An event; the optimizer's moments are written only after it is set, the weights at once."""
    ready = threading.Event()
    original = checkpoint_storage._Writer._write

    def write(self: Any, item: Any, *rest: Any) -> Any:
        assert not checkpoint_storage._is_moment(item) or ready.wait(60)
        return original(self, item, *rest)

    monkeypatch.setattr(checkpoint_storage._Writer, "_write", write)
    yield ready
    ready.set()


def raising(error: Exception) -> Callable[..., None]:
    """A function that raises the error."""

    def fail(*_: Any) -> None:
        raise error

    return fail


def save_and_fail(policy: Policy, directory: Path) -> None:
    """Start a save of step 1, then raise KeyError as training would, before it is complete."""
    with CheckpointWriter() as writer:
        writer.save(policy, directory, 1, {}, keep=1)
        raise KeyError("training")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_during_a_save_does_not_change_the_checkpoint(
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_too_little_host_memory_nothing_is_copied_and_the_next_step_waits(
    model: Path,
    tmp_path: Path,
    disk: threading.Event,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One warning is logged, however many saves wait."""
    monkeypatch.setattr(host, "free_memory", lambda: 0)
    policy = build(model, dtype)
    train(policy, range(2))
    bits = fingerprint(policy)
    with CheckpointWriter() as writer:
        writer.save(policy, tmp_path, 2, {}, keep=1)
        threading.Timer(0.3, disk.set).start()
        train(policy, range(2, 3))
        assert disk.is_set(), "the optimizer changed moments that had not been written yet"
        writer.save(policy, tmp_path / "next", 3, {}, keep=1)
    assert len([line for line in caplog.messages if "too little free memory" in line]) == 1
    resumed = build(model, dtype)
    checkpoint.load_latest(resumed, tmp_path)
    assert fingerprint(resumed) == bits


def test_the_copy_of_a_moved_reference_counts_against_free_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is memory for a copy of the moments, but not for one of the reference's weights as well."""
    policy = build(model)
    reference = Reference(Policy(policy.config, dtype=torch.float32, trainable=False))
    assert policy.optimizer is not None
    enough = int(checkpoint_writer.MARGIN * policy.optimizer.state_bytes) + 1
    monkeypatch.setattr(host, "free_memory", lambda: enough)
    assert checkpoint_writer.Snapshot.take(policy, 1, {}, reference).copied
    reference.become(policy)
    assert not checkpoint_writer.Snapshot.take(policy, 1, {}, reference).copied


def test_the_optimizer_waits_until_the_weights_are_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready, original = threading.Event(), files.begin
    monkeypatch.setattr(files, "begin", lambda *args: ready.wait(60) and original(*args))
    policy = build(model)
    train(policy, [0])
    bits = fingerprint(policy)
    with CheckpointWriter() as writer:
        writer.save(policy, tmp_path, 1, {}, keep=1)
        threading.Timer(0.3, ready.set).start()
        train(policy, [1])
        assert ready.is_set(), "the optimizer changed weights that had not been written yet"
    resumed = build(model)
    checkpoint.load_latest(resumed, tmp_path)
    assert fingerprint(resumed) == bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_save_takes_less_memory_than_a_copy_of_the_state(tmp_path: Path, dtype: torch.dtype) -> None:
    """The state is 12 bytes per parameter, or 14 with bf16: weights, moments and, with bf16, the float32 weights.

    The memory was measured as 0.77 and 0.90 of it.
    """
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "vocab_size": 20_000}
    policy = build(save_model(tmp_path / "model", "qwen2", tied=True, **wide), dtype)
    assert policy.optimizer is not None
    parameters = sum(p.numel() for chunk in policy.model.chunks for p in chunk.parameters())
    state = parameters * (12 if dtype is torch.float32 else 14)
    policy.optimizer.state_bytes  # noqa: B018 - allocates the state
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    checkpoint.save(policy, tmp_path, 1, {}, keep=1)
    assert resident("VmHWM") - before < state


def resident(field: str) -> int:
    """Resident memory of this process in bytes. field: VmRSS, the present memory, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def test_the_next_save_waits_for_the_one_before(model: Path, tmp_path: Path, disk: threading.Event) -> None:
    policy = build(model)
    with CheckpointWriter() as writer:
        writer.save(policy, tmp_path, 1, {}, keep=1)
        threading.Timer(0.2, disk.set).start()
        writer.save(policy, tmp_path, 2, {}, keep=1)
        assert 1 in files.list_checkpoints(tmp_path)
    assert list(files.list_checkpoints(tmp_path)) == [2]


def test_after_an_error_of_the_disk_the_previous_checkpoint_stays_and_the_message_names_the_directory(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = build(model)
    checkpoint.save(policy, tmp_path, 1, {}, keep=1)
    monkeypatch.setattr(files, "commit", raising(OSError("No space left on device")))
    writer = CheckpointWriter()
    writer.save(policy, tmp_path, 2, {}, keep=1)
    while not writer.done:
        pass
    assert writer.failed
    with pytest.raises(UserError, match=rf"{tmp_path}/step_2 was not written: No space left on device"):
        writer.save(policy, tmp_path, 3, {}, keep=1)
    assert not writer.failed, "the error must be raised only once"
    assert checkpoint.load_latest(policy, tmp_path) == (1, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


def test_the_message_names_the_directory_if_a_shard_cannot_be_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemo_disco.checkpoint.storage._Writer.write_data", raising(OSError("read-only")))
    with pytest.raises(UserError, match=rf"{tmp_path}/step_1 was not written: read-only"):
        checkpoint.save(build(model), tmp_path, 1, {}, keep=1)


def test_the_message_names_the_directory_if_a_real_disk_is_full(model: Path, tmp_path: Path) -> None:
    """torch's writer raises an error of its own, which is not an OSError."""
    policy, mount = build(model), tmp_path / "disk"
    with full_disk.mount_small_disk(mount, "512k"):
        with pytest.raises(UserError, match=rf"{mount}/c/step_1 was not written: .*No space left on device") as raised:
            checkpoint.save(policy, mount / "c", 1, {}, keep=1)
        assert "\n" not in str(raised.value) and list(files.list_checkpoints(mount / "c")) == []


def test_an_unexpected_error_keeps_its_traceback(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cause = ZeroDivisionError("a bug")
    monkeypatch.setattr(files, "describe", raising(cause))
    with pytest.raises(RuntimeError, match=rf"{tmp_path}/step_1 was not written: a bug") as raised:
        checkpoint.save(build(model), tmp_path, 1, {}, keep=1)
    assert raised.value.__cause__ is cause


def test_a_run_that_fails_still_finishes_its_checkpoint(model: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="training"):
        save_and_fail(build(model), tmp_path)
    assert list(files.list_checkpoints(tmp_path)) == [1]


def test_the_error_that_ended_the_run_is_raised_and_that_of_the_save_logged(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "commit", raising(OSError("No space left on device")))
    with pytest.raises(KeyError, match="training"):
        save_and_fail(build(model), tmp_path)
    assert caplog.record_tuples[-1][1] == logging.ERROR
    assert f"{tmp_path}/step_1 was not written: No space left on device" in caplog.text
