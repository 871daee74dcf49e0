"""The model at `model.path`: a Hugging Face directory, a checkpoint (RUN/checkpoints/step_N) or a run directory.

Reads paths and JSON; opens no weights.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from typing_extensions import TypedDict

from nemo_disco.config.safe_yaml import read_yaml
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.saved_files import Count, check_types, read_json

_STEP = re.compile(r"step_(\d+)(?:\.replaced)?")


class _Step(TypedDict):
    step: Count


class _Model(TypedDict):
    path: str


class _Config(TypedDict):
    """The one key that is read from a run's configuration, which another version may have written."""

    model: _Model


class ModelSource(NamedTuple):
    """Places of a model's files.

    hugging_face: the directory of the config, the tokenizer and, if `checkpoint` is None, the weights. step: the
    training step of the weights; 0 for a Hugging Face directory.
    """

    hugging_face: str
    checkpoint: Path | None
    step: int


def model_source(path: str) -> ModelSource:
    """The files of the model at `path`; of a run, its latest checkpoint.

    Raises UserError for a run without a checkpoint, and for a checkpoint whose model is not known.
    """
    directory = Path(path)
    if (directory / "checkpoint.json").is_file():
        return _checkpoint_source(directory)
    if (directory / "config.yaml").is_file() and not (directory / "config.json").is_file():
        directories = directory.glob("checkpoints/step_*")
        # Backwards, since step_N.replaced counts only where a killed run left no step_N.
        steps = {int(m[1]): p for p in sorted(directories)[::-1] if (m := _STEP.fullmatch(p.name)) and p.is_dir()}
        if not steps:
            raise UserError(f"model.path={path}: a run directory without a checkpoint; name a Hugging Face directory")
        return _checkpoint_source(steps[max(steps)])
    return ModelSource(path, None, 0)


def _checkpoint_source(checkpoint: Path) -> ModelSource:
    """The files of a checkpoint: a converted one contains Hugging Face's, else its run's config.yaml names them."""
    step = read_json(checkpoint / "checkpoint.json", _Step)["step"]
    hf_files = checkpoint / "hugging_face"
    if hf_files.is_dir():
        return ModelSource(str(hf_files), checkpoint, step)
    config = checkpoint.parent.parent / "config.yaml"
    if not config.is_file():
        raise UserError(f"model.path={checkpoint}: no {config} says which model this is a checkpoint of")
    try:
        path = check_types(config, read_yaml(config), _Config)["model"]["path"]
    except UserError as fault:
        raise UserError(f"{fault}; it says which model this is a checkpoint of") from None
    return ModelSource(path, checkpoint, step)
