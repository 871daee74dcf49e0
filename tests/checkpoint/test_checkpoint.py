"""Saving and loading a policy on one rank is bit-exact; damaged files are named, and planted code is not executed."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import model_config, random_rollouts, save_model
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from training import fingerprint, train

from nemo_disco import checkpoint
from nemo_disco.checkpoint import files as checkpoint_files
from nemo_disco.checkpoint.metadata import METADATA, read_metadata
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy
from nemo_disco.runtime.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "qwen2", tied=True)


def build(path: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Policy:
    config = model_config(path, **changes)
    parallel.start(config)
    return Policy(config, dtype=dtype, total_optimizer_steps=20)


@pytest.fixture(scope="module")
def intact_checkpoints(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the checkpoints step_1 and step_2, which no test may change."""
    policy, directory = build(model), tmp_path_factory.mktemp("checkpoints")
    for step in (1, 2):
        train(policy, [step])
        checkpoint.save(policy, directory, step, {"step": step}, keep=3)
    return directory


@pytest.fixture
def checkpoints(intact_checkpoints: Path, tmp_path: Path) -> Path:
    """A copy of the directory with step_1 and step_2, which a test may damage."""
    return shutil.copytree(intact_checkpoints, tmp_path / "checkpoints")


def update_checksums(path: Path) -> None:
    """Write the present sizes and checksums into the checkpoint's record, as an attacker would who changed a file."""
    record = json.loads((path / checkpoint_files.RECORD).read_text())
    for name, entry in record["files"].items():
        entry |= {"bytes": (path / name).stat().st_size, "sha256": checkpoint_files._hash(path / name)}
    record["sha256"] = checkpoint_files._digest(record)
    (path / checkpoint_files.RECORD).write_text(json.dumps(record))


class Planted:
    """Unpickling this object runs the command `touch FILE`."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.file}",)


SCHEDULE = {
    "name": "adam",
    "lr": 1e-2,
    "weight_decay": 0.1,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "moments_dtype": "float32",
    "offload": False,
    "sched": {"name": "cosine", "warmup_steps": 3, "min_lr": 1e-3},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_is_bit_exact(model: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    uninterrupted = build(model, dtype, optim=SCHEDULE)
    train(uninterrupted, range(3))
    checkpoint.save(uninterrupted, tmp_path, 3, {"step": 3}, keep=1)
    draws = torch.rand(5)
    train(uninterrupted, range(3, 6))

    torch.manual_seed(1)
    resumed = build(model, dtype, optim=SCHEDULE)
    train(resumed, [77])  # loading must replace all of this
    assert checkpoint.load_latest(resumed, tmp_path) == (3, {"step": 3})
    assert torch.equal(torch.rand(5), draws)
    assert resumed.optimizer is not None and resumed.optimizer.steps == 3
    train(resumed, range(3, 6))
    assert fingerprint(resumed) == fingerprint(uninterrupted)


def test_a_checkpoint_from_before_the_first_step_is_loaded(model: Path, tmp_path: Path) -> None:
    uninterrupted = build(model)
    checkpoint.save(uninterrupted, tmp_path, 0, {}, keep=1)
    train(uninterrupted, range(2))
    resumed = build(model)
    checkpoint.load(resumed, tmp_path / "step_0")
    train(resumed, range(2))
    assert fingerprint(resumed) == fingerprint(uninterrupted)


def test_a_policy_without_an_optimizer_loads_the_weights_alone(model: Path, checkpoints: Path) -> None:
    float32, float64 = build(model), build(model, torch.float64)
    checkpoint.load(float32, checkpoints / "step_2")
    assert checkpoint.load(float64, checkpoints / "step_2") == {"step": 2}
    rollouts = random_rollouts()
    expected, _ = float32.log_probs(rollouts)
    torch.testing.assert_close(float64.log_probs(rollouts)[0], expected.double(), rtol=0, atol=1e-5)


def test_the_record_names_step_dtype_layout_optimizer_model_code_and_files(checkpoints: Path) -> None:
    record = json.loads((checkpoints / "step_2" / "checkpoint.json").read_text())
    assert record["step"] == 2
    assert record["dtype"] == "float32"
    assert record["layout"]["tensor_model_parallel_size"] == 1
    assert record["optimizer"] == {"name": "adam", "steps": 2}
    assert record["model"]["num_layers"] == 4
    assert record["code"]["megatron_core"]
    assert set(record["files"]) == {p.name for p in (checkpoints / "step_2").iterdir()} - {"checkpoint.json"}
    assert checkpoint.latest(checkpoints) == checkpoints / "step_2"


def test_a_loop_state_that_is_not_json_is_refused_before_writing(model: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        checkpoint.save(build(model), tmp_path / "checkpoints", 1, {"x": torch.zeros(1)}, keep=1)
    assert not (tmp_path / "checkpoints").exists()


def test_no_checkpoint_is_no_error(model: Path, tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "none") is None
    assert checkpoint.load_latest(build(model), tmp_path / "none") is None


# --- damaged files ---


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["__0_0.distcp", METADATA, "checkpoint.json"])
def test_a_damaged_checkpoint_is_skipped_and_its_file_named(
    model: Path, checkpoints: Path, damage: Callable[[Path], None], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage(checkpoints / "step_2" / name)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.load_latest(build(model), checkpoints) == (1, {"step": 1})
    assert f"step_2: {name}" in caplog.text
    with pytest.raises(UserError, match=f"step_2: {name}"):
        checkpoint.load(build(model), checkpoints / "step_2")


def test_if_all_are_damaged_the_error_names_each(model: Path, checkpoints: Path) -> None:
    for step in (1, 2):
        truncate(checkpoints / f"step_{step}" / "__0_0.distcp")
    with pytest.raises(UserError, match=r"no intact checkpoint .*step_2: __0_0.distcp .*step_1: __0_0.distcp"):
        checkpoint.load_latest(build(model), checkpoints)


def test_a_run_resumed_from_the_previous_checkpoint_replaces_the_damaged_one(model: Path, checkpoints: Path) -> None:
    truncate(checkpoints / "step_2" / "__0_0.distcp")
    policy = build(model)
    checkpoint.load_latest(policy, checkpoints)
    train(policy, [2])
    checkpoint.save(policy, checkpoints, 2, {"step": 2}, keep=3)
    assert checkpoint.load_latest(build(model), checkpoints) == (2, {"step": 2})


def test_a_checkpoint_of_another_model_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", "qwen2", tied=True, intermediate_size=96)
    with pytest.raises(UserError, match=r"another model .*ffn_hidden_size is 128 there and 96 here"):
        checkpoint.load_latest(build(other), checkpoints)


@pytest.mark.parametrize(
    ("saved", "other", "complaint"),
    [
        ({"sliding_window": 7}, {"sliding_window": None}, "window is 7 there and None here"),
        ({"hidden_act": "gelu"}, {"hidden_act": "silu"}, "activation is gelu there and None here"),
    ],
)
def test_a_checkpoint_of_a_network_with_the_same_tensors_is_refused(
    saved: dict[str, Any], other: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    written = save_model(tmp_path / "saved", "mistral", tied=True, **saved)
    policy = build(written)
    checkpoint.save(policy, tmp_path / "checkpoints", 1, {}, keep=1)
    with pytest.raises(UserError, match=complaint):
        checkpoint.load_latest(
            build(save_model(tmp_path / "other", "mistral", tied=True, **other)), tmp_path / "checkpoints"
        )


def test_a_checkpoint_of_a_run_that_had_diverged_is_refused(model: Path, tmp_path: Path) -> None:
    policy = build(model)
    with torch.no_grad():
        next(iter(policy.model.chunks[0].parameters())).view(-1)[-1] = torch.nan
    checkpoint.save(policy, tmp_path, 1, {}, keep=1)
    with pytest.raises(UserError, match=rf"{tmp_path}/step_1: some of its weights are NaN or infinite"):
        checkpoint.load_latest(build(model), tmp_path)


def test_a_checkpoint_of_another_dtype_is_refused(model: Path, checkpoints: Path) -> None:
    with pytest.raises(UserError, match="dtype float32, this run has bfloat16"):
        checkpoint.load_latest(build(model, torch.bfloat16), checkpoints)


# --- malicious files ---


def test_a_planted_command_in_the_metadata_is_refused(model: Path, checkpoints: Path, tmp_path: Path) -> None:
    metadata = read_metadata(checkpoints / "step_2" / METADATA)
    metadata.planner_data = Planted(tmp_path / "executed")
    (checkpoints / "step_2" / METADATA).write_bytes(pickle.dumps(metadata))
    update_checksums(checkpoints / "step_2")
    with pytest.raises(UserError, match=r"names posix\.system"):
        checkpoint.load_latest(build(model), checkpoints)
    assert not (tmp_path / "executed").exists()
    pickle.loads((checkpoints / "step_2" / METADATA).read_bytes())
    assert (tmp_path / "executed").exists()  # an ordinary unpickler runs the command


def test_byte_objects_which_torch_unpickles_freely_are_refused(model: Path, checkpoints: Path) -> None:
    metadata = read_metadata(checkpoints / "step_2" / METADATA)
    metadata.state_dict_metadata["decoder.final_layernorm.weight"] = BytesStorageMetadata()
    (checkpoints / "step_2" / METADATA).write_bytes(pickle.dumps(metadata))
    update_checksums(checkpoints / "step_2")
    with pytest.raises(UserError, match="BytesStorageMetadata"):
        checkpoint.load(build(model), checkpoints / "step_2")


def test_metadata_that_points_elsewhere_is_refused(model: Path, checkpoints: Path) -> None:
    metadata = read_metadata(checkpoints / "step_2" / METADATA)
    next(iter(metadata.storage_data.values())).relative_path = "../step_1/__0_0.distcp"
    (checkpoints / "step_2" / METADATA).write_bytes(pickle.dumps(metadata))
    update_checksums(checkpoints / "step_2")
    with pytest.raises(UserError, match=r"points at '\.\./step_1/__0_0\.distcp'"):
        checkpoint.load(build(model), checkpoints / "step_2")


def test_a_planted_command_in_common_pt_is_never_opened(model: Path, checkpoints: Path, tmp_path: Path) -> None:
    torch.save(Planted(tmp_path / "executed"), checkpoints / "step_2" / "common.pt")
    update_checksums(checkpoints / "step_2")
    assert checkpoint.load(build(model), checkpoints / "step_2") == {"step": 2}
    assert not (tmp_path / "executed").exists()


def test_a_planted_command_in_place_of_a_tensor_is_refused(model: Path, checkpoints: Path, tmp_path: Path) -> None:
    metadata, shards = read_metadata(checkpoints / "step_2" / METADATA), checkpoints / "step_2" / "__0_0.distcp"
    torch.save(Planted(tmp_path / "executed"), shards)
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, shards.stat().st_size
    (checkpoints / "step_2" / METADATA).write_bytes(pickle.dumps(metadata))
    update_checksums(checkpoints / "step_2")
    with pytest.raises(CheckpointException, match="Weights only load failed"):
        checkpoint.load(build(model), checkpoints / "step_2")
    assert not (tmp_path / "executed").exists()


# --- kill -9 ---


def test_killed_at_any_moment_the_last_complete_one_is_usable(model: Path, tmp_path: Path) -> None:
    """kill_saves.py kills its own processes while they save; each new one checks the checkpoint it resumes from."""
    script = Path(__file__).with_name("kill_saves.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(script), str(model), str(tmp_path / "checkpoints")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rounds = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rounds) >= 5
    assert rounds[-1]["resumed_from"] > rounds[1]["resumed_from"] >= 1
    assert any(r["left_unfinished"] for r in rounds), "no process was killed during a save"
    last_two = {f"step_{rounds[-1]['resumed_from'] + more}" for more in (0, 1)}
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == last_two
