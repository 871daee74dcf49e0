"""Contradictions between the keys of a configuration, refused before any model is built.

Each refusal is one line that says which numbers clash and which would work. Reads no file; must not import torch.
"""

from __future__ import annotations

import itertools
import math

from nemo_disco.config.engines import check_engine
from nemo_disco.config.schema import RunConfig
from nemo_disco.runtime.errors import UserError

SHOWN = 16  # numbers that would work, in one line


def check(config: RunConfig, world_size: int) -> None:
    """Raises UserError if keys contradict each other, or `world_size` processes."""
    check_layout(config, world_size)
    _check_fp8(config)
    _check_batch(config)
    _check_weights(config)
    _check_optimizer(config)
    check_engine(config)


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
            f"would work: {listed([n for n in (below, above) if n])}"
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
            f"so the last mini-batch would be smaller; would work: {listed(divisors(questions, mini))}"
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
    longest, sum_of = longest_sequence(config)
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


def longest_sequence(config: RunConfig) -> tuple[int, str]:
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


def divisors(number: int, wanted: int = 1) -> list[int]:
    """The divisors of a number, in order: those nearest to the wanted one, where there are many."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    divisors = {*small, *(number // n for n in small)}
    return sorted(sorted(divisors, key=lambda n: abs(n - wanted))[:SHOWN])


def listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
