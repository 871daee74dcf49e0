"""Contradictions between keys and with the machine, found before any model is built.

Each refusal is one line that says which numbers clash and which would work. Looks at files, opens no weights;
must not import torch, but for `check_objective`.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

from nemo_disco.config.engines import check_engine, check_python
from nemo_disco.config.model_directory import safetensor_names
from nemo_disco.config.model_source import ModelSource, model_source
from nemo_disco.config.schema import RunConfig
from nemo_disco.config.shape import ModelShape, read_shape
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.rundir import RunDirectory

SHOWN = 16  # numbers that would work, in one line


def check(config: RunConfig, world_size: int) -> None:
    """Raises UserError if keys contradict each other, or `world_size` processes."""
    check_layout(config, world_size)
    _check_fp8(config)
    _check_batch(config)
    _check_weights(config)
    _check_optimizer(config)
    check_engine(config)


def check_objective(config: RunConfig) -> None:
    """Raises UserError for what the objective or the reward does not take. Imports torch, and the user's modules."""
    from nemo_disco.algorithms import build_objective
    from nemo_disco.rewards import Rewards

    objective = build_objective(config.algorithm.objective())
    Rewards(config.reward, config.algorithm.preference)
    every = config.algorithm.reference_reset_steps
    if every and "reference_log_probs" not in objective.needs:
        raise UserError(
            f"algorithm.reference_reset_steps={every}: objective {objective.name} has no reference as it is set; "
            "one that has: algorithm=grpo algorithm.kl_coefficient=1e-3"
        )


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
        raise UserError("evaluation.files is empty: name the question files to evaluate on")
    if command == "evaluate" or (command == "train" and config.evaluation.enabled):
        _check_question_files(config.evaluation.files, "evaluation.files")
    if command != "verify" and first_rank:
        RunDirectory(config.exp_manager.explicit_log_dir).create()


def check_shape(config: RunConfig, shape: ModelShape) -> None:
    """Raises UserError if the layout does not divide the model, or the lengths exceed its positions."""
    model = config.model
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    for what, count in (("attention heads", shape.heads), ("key-value heads", shape.kv_heads)):
        if count % tensor:
            raise UserError(
                f"model.tensor_model_parallel_size={tensor} does not divide the model's {count} {what}; "
                f"would work: {_listed(_divisors(math.gcd(shape.heads, shape.kv_heads)))}"
            )
    stages = pipeline * (model.virtual_pipeline_model_parallel_size or 1)
    if shape.layers % stages:
        key = "model.pipeline_model_parallel_size"
        key += " x virtual_pipeline_model_parallel_size" if stages != pipeline else ""
        raise UserError(
            f"{key}={stages} does not divide the model's {shape.layers} layers; "
            f"would work: {_listed(_divisors(shape.layers))}"
        )
    split = config.generation.tensor_parallel_size
    if math.gcd(shape.heads, shape.kv_heads) % split:
        raise UserError(
            f"generation.tensor_parallel_size={split} does not divide the model's {shape.heads} attention heads and "
            f"{shape.kv_heads} key-value heads; "
            f"would work: {_listed(_divisors(math.gcd(shape.heads, shape.kv_heads)))}"
        )
    longest, sum_of = _longest(config)
    if longest > shape.max_positions:
        raise UserError(f"{sum_of} tokens, but the model has {shape.max_positions} positions")


def check_layout(config: RunConfig, world_size: int) -> None:
    """Raises UserError if the layout does not divide the processes, or a response does not fit its token budget."""
    _check_processes(config, world_size)
    _check_lengths(config)


def _check_processes(config: RunConfig, world_size: int) -> None:
    model = config.model
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    context, virtual = model.context_parallel_size, model.virtual_pipeline_model_parallel_size
    size = tensor * pipeline * context
    if world_size % size:
        below, above = world_size // size * size, -(-world_size // size) * size
        raise UserError(
            f"TP {tensor} x PP {pipeline} x CP {context} needs a multiple of {size} processes, but there are "
            f"{world_size} (trainer.devices x trainer.num_nodes); "
            f"would work: {_listed([n for n in (below, above) if n])}"
        )
    if model.sequence_parallel and tensor == 1:
        raise UserError(
            "model.sequence_parallel=true splits what tensor parallelism leaves whole: it needs "
            "model.tensor_model_parallel_size above 1"
        )
    if virtual is not None and pipeline == 1:
        raise UserError(
            f"model.virtual_pipeline_model_parallel_size={virtual} needs model.pipeline_model_parallel_size above 1"
        )


def _check_fp8(config: RunConfig) -> None:
    model = config.model
    if model.fp8 is None and model.fp8_param_gather:
        raise UserError("model.fp8_param_gather=true needs model.fp8=delayed, current or blockwise")
    if model.fp8 is not None and config.trainer.precision != "bf16":
        raise UserError(f"model.fp8={model.fp8} needs trainer.precision=bf16, not {config.trainer.precision}")
    for key in ("fp8", "apply_rope_fusion"):
        if getattr(model, key) and model.transformer_engine is False:
            raise UserError(
                f"model.{key} is Transformer Engine's, and model.transformer_engine=false; set it to null or true"
            )


def _check_batch(config: RunConfig) -> None:
    questions, mini = config.data.questions_per_step, config.algorithm.mini_batch_questions
    if questions % mini:
        raise UserError(
            f"algorithm.mini_batch_questions={mini} does not divide data.questions_per_step={questions}, "
            f"so the last mini-batch would be smaller; would work: {_listed(_divisors(questions, mini))}"
        )
    if config.generation.responses_per_question == 1 and ":" not in config.algorithm.name:
        raise UserError(
            f"generation.responses_per_question=1: {config.algorithm.name} compares the responses of a question; "
            "would work: 2 or more"
        )


def _check_weights(config: RunConfig) -> None:
    files, weights = config.data.train_files, config.data.train_weights
    if weights is not None and len(weights) != len(files):
        raise UserError(
            f"data.train_weights has {len(weights)} weights for {len(files)} data.train_files; give one each"
        )


def _check_lengths(config: RunConfig) -> None:
    model, generation = config.model, config.generation
    schedule = [(0, generation.max_response_length), *generation.response_length_schedule]
    for (step, limit), (later, higher) in itertools.pairwise(schedule):
        if later <= step or higher <= limit:
            raise UserError(
                f"generation.response_length_schedule: [{later}, {higher}] after [{step}, {limit}]; steps and limits "
                "must both rise, from generation.max_response_length on"
            )
    longest, sum_of = _longest(config)
    # What packing rounds up to: 2 pieces a context-parallel rank, and one a tensor-parallel rank of each under SP.
    context, tensor = model.context_parallel_size, model.tensor_model_parallel_size
    shares = context * tensor if model.sequence_parallel else context
    multiple = math.lcm(2 * context if context > 1 else 1, shares * model.fp8_tokens)
    needed = -(-longest // multiple) * multiple
    if model.token_budget < needed:
        raise UserError(
            f"model.token_budget={model.token_budget} is smaller than one response with its prompt: {sum_of}; "
            f"would work: model.token_budget={needed} or more"
        )


def _longest(config: RunConfig) -> tuple[int, str]:
    """The longest sequence in tokens, and how it comes about."""
    prompt, response = config.data.max_prompt_length, config.generation.longest_response
    key = "response_length_schedule" if config.generation.response_length_schedule else "max_response_length"
    words = f"data.max_prompt_length={prompt} + generation.{key}={response} = {prompt + response}"
    return prompt + response, words


def _check_optimizer(config: RunConfig) -> None:
    optim = config.model.optim
    if not all(0 <= beta < 1 for beta in optim.betas):
        raise UserError(f"model.optim.betas={list(optim.betas)}: each must be at least 0 and below 1")
    if optim.sched.min_lr > optim.lr:
        raise UserError(f"model.optim.sched.min_lr={optim.sched.min_lr:g} is above model.optim.lr={optim.lr:g}")


def _check_question_files(files: list[str], key: str) -> None:
    for file in files:
        if not Path(file).exists():
            raise UserError(f"{key}: there is no {file}")


def _divisors(number: int, wanted: int = 1) -> list[int]:
    """The divisors of a number, in order: those nearest to the wanted one, where there are many."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    divisors = {*small, *(number // n for n in small)}
    return sorted(sorted(divisors, key=lambda n: abs(n - wanted))[:SHOWN])


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
