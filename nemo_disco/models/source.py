"""What `model.path` may name: a Hugging Face directory, a checkpoint (RUN/checkpoints/step_N), or a run directory.

Path and JSON work; opens no weights.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from typing_extensions import TypedDict

from nemo_disco.config.safe_yaml import read_yaml
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.saved_files import Count, check_shape, read_json

_STEP = re.compile(r"step_(\d+)(?:\.replaced)?")


class _Step(TypedDict):
    step: Count


class _Model(TypedDict):
    path: str


class _Config(TypedDict):
    """One key of what may be another version's configuration."""

    model: _Model


class ModelSource(NamedTuple):
    """hugging_face: the directory of config and tokenizer, and of the weights where `checkpoint` is None.

    step: the training step of the weights; 0 for a Hugging Face directory.
    """

    hugging_face: str
    checkpoint: Path | None
    step: int


def model_source(path: str) -> ModelSource:
    """Raises UserError for a run without a checkpoint, and for a checkpoint whose model is not known."""
    directory = Path(path)
    if (directory / "checkpoint.json").is_file():
        return _of_checkpoint(directory)
    if (directory / "config.yaml").is_file() and not (directory / "config.json").is_file():
        found = directory.glob("checkpoints/step_*")
        # Backwards, since step_N.replaced counts only where a kill left no step_N.
        steps = {int(m[1]): p for p in sorted(found)[::-1] if (m := _STEP.fullmatch(p.name)) and p.is_dir()}
        if not steps:
            raise UserError(f"model.path={path}: a run directory without a checkpoint; name a Hugging Face directory")
        return _of_checkpoint(steps[max(steps)])
    return ModelSource(path, None, 0)


def _of_checkpoint(checkpoint: Path) -> ModelSource:
    """A converted checkpoint carries its Hugging Face files along; a run's config.yaml names the directory."""
    step = read_json(checkpoint / "checkpoint.json", _Step)["step"]
    carried = checkpoint / "hugging_face"
    if carried.is_dir():
        return ModelSource(str(carried), checkpoint, step)
    config = checkpoint.parent.parent / "config.yaml"
    if not config.is_file():
        raise UserError(f"model.path={checkpoint}: no {config} says which model this is a checkpoint of")
    try:
        path = check_shape(config, read_yaml(config), _Config)["model"]["path"]
    except UserError as fault:
        raise UserError(f"{fault}; it says which model this is a checkpoint of") from None
    return ModelSource(path, checkpoint, step)
