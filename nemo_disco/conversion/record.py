"""Writes and verifies checkpoint.json, the record by which a converted checkpoint can be loaded like a run's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import nemo_disco
from nemo_disco.checkpoint import files
from nemo_disco.models.hf_config import load_hf_config
from nemo_disco.models.shape import read_shape
from nemo_disco.runtime.errors import UserError


def write_converted_record(work: Path, source: Path) -> None:
    """Write the record of weights alone, without optimizer and loop state, once `work` has every other file."""
    config = load_hf_config(source)
    record: dict[str, Any] = {
        "format": files.FORMAT,
        "step": 0,
        "code": {"nemo_disco": nemo_disco.__version__, "torch": torch.__version__},
        "dtype": str(config.dtype or torch.float32).removeprefix("torch."),
        "optimizer": None,
        "model": read_shape(source).identity(config),
        "loop_state": {},
        "random_state": [],
        "files": files.describe(work, 0),
    }
    files.write_record(work, json.loads(json.dumps(record)))


def verify_files(checkpoint: Path) -> None:
    """Compare a checkpoint's files with its record, if it has one. Raises UserError that names a damaged file."""
    if not (checkpoint / files.RECORD).is_file():
        return
    try:
        record = files.read_record(checkpoint)
        files.check(checkpoint, record["files"], sorted(record["files"]))
    except files.DamagedError as damage:
        raise UserError(f"checkpoint {checkpoint}: {damage}; choose another one") from None


def training_dtype(checkpoint: Path, model: Path) -> torch.dtype | None:
    """The type that the weights of a training run get, from the config; None (as stored) for any other checkpoint."""
    if not (checkpoint / files.RECORD).is_file() or files.read_record(checkpoint)["optimizer"] is None:
        return None
    dtype: torch.dtype | None = load_hf_config(model).dtype
    return dtype
