"""Parts that train, evaluate and verify share: process groups, the run directory's lock, policy, engine, grader."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_disco import checkpoint
from nemo_disco.algorithms.objectives import Objective, build_objective
from nemo_disco.algorithms.step import PROVIDED
from nemo_disco.config.consistency import longest_sequence
from nemo_disco.config.schema import RunConfig
from nemo_disco.data.chat import encode_prompts
from nemo_disco.data.question_order import QuestionOrder
from nemo_disco.data.questions import load_questions
from nemo_disco.data.tokenizer import stop_token_ids, vocabulary_size
from nemo_disco.estimate.trust_region import check_likely_tokens
from nemo_disco.evaluation.result import file_stem
from nemo_disco.generation.build import build_engine
from nemo_disco.generation.engine import Engine
from nemo_disco.models.shape import read_shape
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy
from nemo_disco.rewards import Rewards
from nemo_disco.rewards.grader import Grader
from nemo_disco.rewards.registry import build_verifier, hash_verifier
from nemo_disco.rewards.user_pool import rank_workers
from nemo_disco.rollout.collector import Collector
from nemo_disco.rollout.evaluation import Evaluator
from nemo_disco.rollout.prompts import PromptSet
from nemo_disco.runtime.collectives import is_first_rank
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.rundir import RunDirectory

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "64": torch.float64}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Components:
    """The policy, an engine on it, and a grader."""

    policy: Policy
    engine: Engine
    grader: Grader


@contextlib.contextmanager
def process_groups(config: RunConfig) -> Iterator[None]:
    """The ranks' process groups, ended at the exit; at an error without waiting for the other ranks."""
    parallel.start(config.model, config.seed)
    try:
        yield
    except BaseException:
        parallel.stop(failed=True)
        raise
    parallel.stop()


@contextlib.contextmanager
def lock_run_directory(run: RunDirectory) -> Iterator[None]:
    """Rank 0 locks the run directory; the other ranks wait until it has."""
    with run.lock() if is_first_rank() else contextlib.nullcontext():
        dist.barrier()
        yield


@contextlib.contextmanager
def build_components(
    config: RunConfig,
    tokenizer: Any,
    *,
    dtype: torch.dtype | None = None,
    trainable: bool = True,
    checkpoint_path: Path | None = None,
) -> Iterator[Components]:
    """Policy, engine and grader, closed at the exit. checkpoint_path: where the weights are, if not in model.path."""
    policy = build_policy(config, tokenizer, dtype=dtype, trainable=trainable, read_weights=checkpoint_path is None)
    if checkpoint_path is not None:
        checkpoint.load(policy, checkpoint_path)
    engine = build_engine(
        config.generation,
        policy,
        stop_token_ids(tokenizer, config.model.path),
        max_length=longest_sequence(config)[0],
        logs=RunDirectory(config.exp_manager.explicit_log_dir).path / "engines",
    )
    try:
        with build_verifier(config.reward, rank_workers(config.reward.workers)) as grader:
            yield Components(policy, engine, grader)
    finally:
        engine.close()


def build_policy(
    config: RunConfig,
    tokenizer: Any,
    *,
    dtype: torch.dtype | None = None,
    trainable: bool = True,
    read_weights: bool = True,
) -> Policy:
    """The policy of model.path on this rank. dtype: None for trainer.precision's. A collective."""
    mini_batches = -(-config.data.questions_per_step // config.algorithm.mini_batch_questions)
    return Policy(
        config.model,
        dtype=dtype or DTYPES[config.trainer.precision],
        temperature=config.generation.temperature,
        clip_grad=config.trainer.gradient_clip_val,
        total_optimizer_steps=config.trainer.max_steps * mini_batches,
        trainable=trainable,
        read_weights=read_weights,
        vocabulary=vocabulary_size(tokenizer),
        longest=longest_sequence(config)[0],
    )


def read_prompts(
    name: str, files: Sequence[str], config: RunConfig, tokenizer: Any, weights: Sequence[float] | None = None
) -> PromptSet:
    """The questions of the files as prompts. Rank 0 logs which records were left out."""
    loaded = load_questions(files, weights, config.data.max_bad_records)
    prompts, notes = encode_prompts(
        tokenizer,
        loaded.questions,
        suffix=config.data.prompt_suffix,
        max_prompt_length=config.data.max_prompt_length,
        too_long=config.data.too_long,
        system=config.data.system_prompt,
        template_arguments=config.data.chat_template_kwargs,
        vocabulary=read_shape(config.model.path).vocab,
    )
    if is_first_rank():
        for note in (*loaded.notes, *notes):
            log.warning("%s", note)
    return PromptSet(name, [p.question for p in prompts], [p.token_ids for p in prompts], tokenizer)


def check_compared_tokens(config: RunConfig, objective: Objective, tokenizer: Any) -> None:
    """Raises UserError if the objective's constraint compares more tokens than the model has."""
    check_likely_tokens(
        objective.constraint.likely_tokens, min(vocabulary_size(tokenizer), read_shape(config.model.path).vocab)
    )


def read_evaluation_sets(config: RunConfig, tokenizer: Any) -> list[PromptSet]:
    """One prompt set a file of evaluation.files. Raises UserError if two would write to the same result file."""
    names = [file_stem(Path(file).stem) for file in config.evaluation.files]
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise UserError(f"evaluation.files: two files are named {duplicates[0]} where results are written; rename one")
    sets = [read_prompts(Path(file).stem, [file], config, tokenizer) for file in config.evaluation.files]
    limit = config.evaluation.max_questions
    return [s.select(range(min(len(s), limit or len(s)))) for s in sets]


def build_run_objective(config: RunConfig) -> Objective:
    """The configured objective. Raises UserError if it needs a signal that the trainer does not compute."""
    objective = build_objective(config.algorithm.objective())
    columns = {*objective.reward_terms, *(signal.name for signal in objective.signals())}
    if missing := sorted(objective.needs - PROVIDED - columns):
        raise UserError(
            f"objective {objective.name} needs {' and '.join(missing)}, which nothing computes: declare it in "
            "`signals` or `reward_terms`, take another objective, or its setting that does without"
        )
    return objective


def build_collector(
    config: RunConfig,
    parts: Components,
    objective: Objective,
    prompts: PromptSet,
    order: QuestionOrder,
    log: Callable[[str], None],
    dynamic_sampling_rounds: int = 0,
) -> Collector:
    """The collector of the rollouts that the objective needs. log: prints a line for the user."""
    return Collector(
        config.generation,
        engine=parts.engine,
        grader=parts.grader,
        rewards=Rewards(config.reward, objective.reward_terms),
        prompts=prompts,
        order=order,
        seed=config.seed,
        threshold=config.algorithm.threshold,
        log=log,
        signals=objective.signals(),
        dynamic_sampling_rounds=dynamic_sampling_rounds,
        restart_if_changed=config.data.if_changed == "restart",
        routes=config.model.moe_router_replay == "engine",
    )


def build_evaluator(config: RunConfig, parts: Components) -> Evaluator:
    """The evaluator of the policy, by evaluation.*."""
    return Evaluator(
        config.evaluation,
        engine=parts.engine,
        grader=parts.grader,
        max_response_length=config.generation.longest_response,
        seed=config.seed,
        threshold=config.algorithm.threshold,
        settings=_identity_settings(config),
    )


def _identity_settings(config: RunConfig) -> dict[str, Any]:
    """The settings outside evaluation.* that decide samples and verdicts."""
    engine = {"engine", "quantization", "options", "tensor_parallel_size"}
    model = {"fp8", "transformer_engine", "apply_rope_fusion", "bias_activation_fusion", "trust_remote_code"}
    return {
        "engine": config.generation.model_dump(include=engine),
        "precision": config.trainer.precision,
        "model": config.model.model_dump(include=model),
        "reward": config.reward.model_dump(include={"verifier", "parameters", "require_think", "timeout"}),
        "verifier_code": hash_verifier(config.reward),
    }
