"""What `model.path` may name: a Hugging Face directory, a checkpoint (RUN/checkpoints/step_N), or a run directory.

Path and JSON work; opens no weights.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import yaml

from nemo_disco.runtime.errors import UserError

_STEP = re.compile(r"step_(\d+)")


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
        steps = {int(m[1]): p for p in directory.glob("checkpoints/step_*") if (m := _STEP.fullmatch(p.name))}
        if not steps:
            raise UserError(f"model.path={path}: a run directory without a checkpoint; name a Hugging Face directory")
        return _of_checkpoint(steps[max(steps)])
    return ModelSource(path, None, 0)


def _of_checkpoint(checkpoint: Path) -> ModelSource:
    """A converted checkpoint carries its Hugging Face files along; a run's config.yaml names the directory."""
    try:
        step = int(json.loads((checkpoint / "checkpoint.json").read_text(encoding="utf-8")).get("step", 0))
    except (ValueError, AttributeError, OSError) as error:
        raise UserError(f"{checkpoint}/checkpoint.json cannot be read ({error})") from error
    carried = checkpoint / "hugging_face"
    if carried.is_dir():
        return ModelSource(str(carried), checkpoint, step)
    config = checkpoint.parent.parent / "config.yaml"
    if not config.is_file():
        raise UserError(f"model.path={checkpoint}: no {config} says which model this is a checkpoint of")
    try:  # one key of what may be another version's configuration
        path = str(yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["path"])
    except (yaml.YAMLError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{config} does not say model.path ({type(error).__name__})") from error
    return ModelSource(path, checkpoint, step)
