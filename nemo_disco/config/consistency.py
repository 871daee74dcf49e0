"""Checks that the keys of a configuration agree with each other, before any model is built.

An error is one line that names the values that contradict each other and the values that would work. An engine
checks its quantization and its options itself when it starts. Must not import torch.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil

from nemo_disco.config.schema import GenerationConfig, ModelConfig, RunConfig
from nemo_disco.runtime.errors import UserError

MAX_SUGGESTIONS = 16  # numbers that would work, in one message

# Keys that the megatron engine does not use, and why; any value but the default is refused.
_EXTERNAL_ENGINES_ONLY = {
    "python": "the policy samples in its own process",
    "replicas": "it samples on the policy's own ranks",
    "tensor_parallel_size": "it has the policy's layout: set model.tensor_model_parallel_size",
    "nodes": "it samples on the policy's own ranks",
    "quantization": "it samples from the policy's own weights",
    "options": "it has no constructor of its own",
}


def check_consistency(config: RunConfig, world_size: int) -> None:
    """Raise UserError if keys contradict each other or the number of processes."""
    check_layout(config, world_size)
    _check_fp8(config)
    _check_batch(config)
    _check_train_weights(config)
    _check_optimizer(config)
    _check_engine(config)


def check_layout(config: RunConfig, world_size: int) -> None:
    """Raise UserError if the layout does not fit the processes, or if the lengths or the token budget do not agree."""
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
            f"would work: {format_numbers([n for n in (below, above) if n])}"
        )
    _check_expert_layout(model, world_size)
    if model.sequence_parallel and tensor == 1:
        raise UserError(
            "model.sequence_parallel=true splits activations over the tensor-parallel ranks: it needs "
            "model.tensor_model_parallel_size above 1"
        )
    if virtual is not None and pipeline == 1:
        raise UserError(
            f"model.virtual_pipeline_model_parallel_size={virtual} needs model.pipeline_model_parallel_size above 1"
        )


def _check_expert_layout(model: ModelConfig, world_size: int) -> None:
    """Raises UserError for a split of experts that the processes or the tensor-parallel groups do not allow."""
    tensor, experts = model.tensor_model_parallel_size, model.expert_model_parallel_size
    split, pipeline = model.expert_tensor_parallel_size or tensor, model.pipeline_model_parallel_size
    if tensor % split:
        raise UserError(
            f"model.expert_tensor_parallel_size={split} does not divide model.tensor_model_parallel_size={tensor}; "
            f"would work: {format_numbers(divisors(tensor))}"
        )
    if world_size % (size := split * experts * pipeline):
        raise UserError(
            f"EP {experts} x ETP {split} x PP {pipeline} needs a multiple of {size} processes, but there are "
            f"{world_size} (trainer.devices x trainer.num_nodes); would work: "
            f"model.expert_model_parallel_size={format_numbers(divisors(world_size // (split * pipeline)))}"
        )
    if split * experts % tensor and tensor % (split * experts):  # ranks that sample together would exchange apart
        raise UserError(
            f"EP {experts} x ETP {split} and TP {tensor}: one must divide the other; would work: "
            f"model.expert_model_parallel_size={tensor} or a multiple"
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
            f"so the last mini-batch would be smaller; would work: {format_numbers(divisors(questions, mini))}"
        )
    if config.generation.responses_per_question == 1 and ":" not in config.algorithm.name:
        raise UserError(
            f"generation.responses_per_question=1: {config.algorithm.name} compares the responses of a question; "
            "would work: 2 or more"
        )


def _check_train_weights(config: RunConfig) -> None:
    files, weights = config.data.train_files, config.data.train_weights
    if weights is not None and len(weights) != len(files):
        raise UserError(
            f"data.train_weights has {len(weights)} weights for {len(files)} data.train_files; give one per file"
        )


def _check_lengths(config: RunConfig) -> None:
    model, generation = config.model, config.generation
    schedule = [(0, generation.max_response_length), *generation.response_length_schedule]
    for (step, limit), (next_step, next_limit) in itertools.pairwise(schedule):
        if next_step <= step or next_limit <= limit:
            raise UserError(
                f"generation.response_length_schedule: [{next_step}, {next_limit}] after [{step}, {limit}]; steps and "
                "limits must both rise, from generation.max_response_length on"
            )
    longest, explanation = longest_sequence(config)
    # Packing pads to a multiple: 2 pieces per context-parallel rank, under SP each cut again per tensor-parallel rank.
    context, tensor = model.context_parallel_size, model.tensor_model_parallel_size
    shares = context * tensor if model.sequence_parallel else context
    multiple = math.lcm(2 * context if context > 1 else 1, shares * model.fp8_tokens)
    needed = -(-longest // multiple) * multiple
    if model.token_budget < needed:
        raise UserError(
            f"model.token_budget={model.token_budget} is smaller than one response with its prompt: {explanation}; "
            f"would work: model.token_budget={needed} or more"
        )


def longest_sequence(config: RunConfig) -> tuple[int, str]:
    """Length of the longest sequence in tokens, and the sum of keys that gives it, for messages."""
    prompt, response = config.data.max_prompt_length, config.generation.longest_response
    key = "response_length_schedule" if config.generation.response_length_schedule else "max_response_length"
    explanation = f"data.max_prompt_length={prompt} + generation.{key}={response} = {prompt + response}"
    return prompt + response, explanation


def _check_optimizer(config: RunConfig) -> None:
    optim = config.model.optim
    if not all(0 <= beta < 1 for beta in optim.betas):
        raise UserError(f"model.optim.betas={list(optim.betas)}: each must be at least 0 and below 1")
    if optim.sched.min_lr > optim.lr:
        raise UserError(f"model.optim.sched.min_lr={optim.sched.min_lr:g} is above model.optim.lr={optim.lr:g}")


def _check_engine(config: RunConfig) -> None:
    generation = config.generation
    if config.model.moe_router_replay == "engine" and generation.engine != "vllm":
        raise UserError(
            f"model.moe_router_replay=engine: generation={generation.engine} does not return its experts; would work: "
            "generation=vllm, or model.moe_router_replay=trainer"
        )
    if generation.engine == "megatron":
        for key, reason in _EXTERNAL_ENGINES_ONLY.items():
            if (value := getattr(generation, key)) not in (None, 1, [], {}):
                raise UserError(f"generation.{key}={value}: not for generation=megatron, {reason}; leave it out")
        if generation.asynchronous:
            raise UserError(
                "generation.asynchronous=true is not possible with generation=megatron: it samples in the processes "
                "that train; would work: generation=vllm or tensorrt_llm, with generation.colocated=false"
            )
        return
    if generation.python is None:
        raise UserError(
            f"generation.python: name the interpreter of an environment that has {generation.engine} (docs/engines.md)"
        )
    if generation.top_p < 1 or generation.top_k > 0:
        raise UserError(
            f"generation.top_p={generation.top_p}, generation.top_k={generation.top_k}: {generation.engine} would "
            "return log-probs of the truncated distribution, and the trainer computes those of the full one; "
            "would work: top_p=1.0 and top_k=0, or generation=megatron"
        )
    if config.trainer.precision == "64":
        raise UserError(f"trainer.precision=64: {generation.engine} has no float64; would work: 32, bf16")
    if generation.nodes and len(set(generation.nodes)) < len(generation.nodes):
        raise UserError(f"generation.nodes={generation.nodes} names a host twice; set generation.replicas instead")
    if generation.asynchronous:
        _check_asynchronous(config)


def _check_asynchronous(config: RunConfig) -> None:
    if config.generation.colocated and not config.generation.nodes:
        raise UserError(
            "generation.asynchronous=true samples while the policy trains, and generation.colocated=true puts the "
            "engine to sleep then; would work: generation.colocated=false, or generation.nodes"
        )
    if config.algorithm.off_policy.get("kind") is None:
        raise UserError(
            "generation.asynchronous=true samples with the weights of the step before: choose the correction for it, "
            "algorithm.off_policy.kind=truncated_importance_sampling, sequence_importance_sampling, icepop, "
            "sequence_mask, outlier_mask, or none"
        )


def check_python(generation: GenerationConfig) -> None:
    """Raise UserError if the engine's interpreter is missing (not checked for engines on hosts of their own)."""
    if generation.python is None or generation.nodes or shutil.which(generation.python):
        return
    problem = "is not executable" if os.path.exists(generation.python) else "is not there"
    remedy = "make it with `make vllm`" if generation.engine == "vllm" else "make that environment first"
    raise UserError(f"generation.python={generation.python} {problem}; {remedy} (docs/engines.md), or name another")


def divisors(number: int, near: int = 1) -> list[int]:
    """Divisors of a number in ascending order; if there are many, the MAX_SUGGESTIONS nearest to `near`."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    both = {*small, *(number // n for n in small)}
    return sorted(sorted(both, key=lambda n: abs(n - near))[:MAX_SUGGESTIONS])


def format_numbers(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
