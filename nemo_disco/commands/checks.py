"""Refusals that need the model's files, the objective or the run directory, before any rank builds a model."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_disco.config.consistency import check_python
from nemo_disco.config.schema import RunConfig
from nemo_disco.estimate.layouts import check_shape
from nemo_disco.models.directory import safetensor_names
from nemo_disco.models.shape import read_shape
from nemo_disco.models.source import ModelSource, model_source
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.rundir import RunDirectory

if TYPE_CHECKING:
    from nemo_disco.algorithms import Objective


def check_objective(config: RunConfig) -> Objective:
    """The configured objective. Raises UserError for settings that it or the reward does not take."""
    from nemo_disco.algorithms.objectives.registry import build_objective, parameter_keys
    from nemo_disco.rewards import Rewards

    mapping = config.algorithm.objective()
    loop_keys = type(config.algorithm).model_fields
    for key in sorted(mapping.keys() - {*loop_keys, *parameter_keys(config.algorithm.name)}):
        if close := get_close_matches(key, loop_keys, n=1, cutoff=0.8):
            raise UserError(f"unknown key algorithm.{key}; did you mean algorithm.{close[0]}?")
    objective = build_objective(mapping)
    Rewards(config.reward, objective.reward_terms)
    every = config.algorithm.reference_reset_steps
    if every and "reference_log_probs" not in objective.needs:
        raise UserError(
            f"algorithm.reference_reset_steps={every}: objective {objective.name} has no reference as it is set; "
            "one that has: algorithm=grpo algorithm.kl_coefficient=1e-3"
        )
    return objective


def check_files(config: RunConfig, command: str, first_rank: bool = True) -> None:
    """Raises UserError for a model, question file or run directory that a command (train, evaluate, verify) cannot use.

    The run directory is made here, by the first rank.
    """
    source = model_source(config.model.path) if command == "evaluate" else ModelSource(config.model.path, None, 0)
    check_shape(config, read_shape(source.hugging_face))
    if source.checkpoint is None:
        safetensor_names(Path(source.hugging_face))
    check_python(config.generation)
    if command in ("train", "verify"):
        if not config.data.train_files:
            raise UserError(f"data.train_files must be given to {command}: add 'data.train_files=[questions.jsonl]'")
        _check_question_files(config.data.train_files, "data.train_files")
    if command == "evaluate" and not config.evaluation.files:
        raise UserError("evaluation.files is empty: add 'evaluation.files=[heldout.jsonl]'")
    if command == "evaluate" or (command == "train" and config.evaluation.enabled):
        _check_question_files(config.evaluation.files, "evaluation.files")
    if command != "verify" and first_rank:
        RunDirectory(config.exp_manager.explicit_log_dir).create()


def _check_question_files(files: list[str], key: str) -> None:
    for file in files:
        if not Path(file).exists():
            raise UserError(f"{key}: there is no {file}{'' if Path(file).is_absolute() else f' in {Path.cwd()}'}")
