"""The commands' wiring: from a RunConfig to a running algorithm, on every rank. No logic of its own."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_disco.algorithms.agreement import check_engine
from nemo_disco.algorithms.benchmark import evaluate_set, weights_identity
from nemo_disco.algorithms.cautions import Cautions
from nemo_disco.algorithms.journal import Journal
from nemo_disco.algorithms.objectives import Objective, build_objective
from nemo_disco.algorithms.sampling import Questions
from nemo_disco.algorithms.step import PROVIDED
from nemo_disco.algorithms.trainer import DisCO
from nemo_disco.config.compose import changes, load_run_config, to_yaml
from nemo_disco.config.model_source import model_source
from nemo_disco.config.schema import RunConfig
from nemo_disco.config.shape import read_shape
from nemo_disco.data.chat import encode_prompts
from nemo_disco.data.questions import load_questions
from nemo_disco.data.sampler import QuestionSampler
from nemo_disco.data.tokenizer import load_tokenizer, stop_token_ids, vocabulary_size
from nemo_disco.evaluation.papers import print_estimates, print_tables, read_reference
from nemo_disco.evaluation.result import (
    EvaluationResult,
    evaluation_file,
    file_stem,
    read_evaluations,
    write_evaluation,
)
from nemo_disco.generation.build import build_engine
from nemo_disco.generation.engine import Engine
from nemo_disco.policy import checkpoint, checkpoint_files, parallel
from nemo_disco.policy.policy import Policy
from nemo_disco.policy.reference import Reference
from nemo_disco.rewards.registry import Grader, build_verifier
from nemo_disco.rewards.user_pool import rank_workers
from nemo_disco.runtime.earlier_life import set_aside
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.files import write_atomically
from nemo_disco.runtime.model_record import ModelRecord, as_files, read_record
from nemo_disco.runtime.rundir import RunDirectory

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "64": torch.float64}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Room:
    """What every command needs: the policy, an engine on it, a grader."""

    policy: Policy
    engine: Engine
    grader: Grader


def train(config: RunConfig) -> int:
    """`nemo-disco train`: train, export the policy, and show what changed."""
    run = RunDirectory(config.exp_manager.explicit_log_dir)
    objective = _objective(config)
    with _started(config), _held(run):
        # What may be refused is read before the policy is built.
        _refuse_used(run, config)
        tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
        questions = read_questions("train", config.data.train_files, config, tokenizer, config.data.train_weights)
        weights = [q.weight for q in questions.questions]
        per_step, shuffle = config.data.questions_per_step, config.data.shuffle
        sampler = QuestionSampler(len(questions), per_step, config.seed, shuffle, weights, questions.content())
        evaluation_sets = _evaluation_sets(config, tokenizer) if config.evaluation.enabled else []
        needs_reference = "reference_log_probs" in objective.needs
        with _room(config, tokenizer) as room:
            algorithm = DisCO(
                config,
                policy=room.policy,
                engine=room.engine,
                objective=objective,
                grader=room.grader,
                questions=questions,
                sampler=sampler,
                evaluation_sets=evaluation_sets,
                journal=Journal(
                    run,
                    config.exp_manager,
                    writes=_first(),
                    delta=_delta(objective),
                    settings=config.model_dump(mode="json", by_alias=True),
                ),
                reference=Reference(_policy(config, tokenizer, trainable=False)) if needs_reference else None,
            )
            with contextlib.closing(algorithm):
                _resume(algorithm, run, config)
                run.check_held()
                if _first():
                    sets = [file_stem(questions.name) for questions in evaluation_sets]
                    if moved := set_aside(run, algorithm.step, sets):
                        log.warning("%s", moved)
                    write_atomically(run.config, to_yaml(config))
                algorithm.fit()
                if algorithm.finished:
                    run.check_held()
                    _export(room.policy, run, algorithm.step)
                    if _first():
                        _show(run)
    return 0


def evaluate(config: RunConfig) -> int:
    """`nemo-disco evaluate`: score model.path (a Hugging Face directory, a checkpoint, a run) on evaluation.files."""
    run = RunDirectory(config.exp_manager.explicit_log_dir)
    # In the directory of a training run the result must not pass for the one before training.
    directory = run.path / "evaluate" if run.metrics.exists() else run.evaluation
    source = model_source(config.model.path)
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": source.hugging_face})})
    reference = read_reference(Path(config.evaluation.reference)) if config.evaluation.reference else {}
    with _started(config), _held(run):
        tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
        sets = _evaluation_sets(config, tokenizer)
        with _room(config, tokenizer, trainable=False, checkpoint_path=source.checkpoint) as room:
            room.engine.update_weights(room.policy.named_weights, 0)
            check_engine(config, room.policy, room.engine, sets[0])
            results, cautions = [], Cautions(config.reward.require_think)
            for questions in sets:
                samples = evaluation_file(directory, questions.name, source.step).with_suffix(".samples.jsonl")
                stream = (samples, weights_identity(source))
                run.check_held()
                result = evaluate_set(
                    room.engine, room.grader, questions, config, source.step, stream, cautions=cautions
                )
                assert result is not None, "nothing asks it to stop"
                results.append(result)
                run.check_held()
                if _first():
                    path = write_evaluation(directory, result)
                    print_estimates(result)
                    print(f"written to {path}; every sample: {samples}")
            if _first():
                model = room.policy.hf_config
                print_tables(results, reference, (model.model_type, model.hidden_size))
    return 0


def verify(config: RunConfig) -> int:
    """`nemo-disco verify`: one mini-batch on this layout."""
    from nemo_disco.algorithms.verify import check_places, verify_mini_batch

    check_places(config.verify)
    objective = _objective(config)
    with _started(config):
        tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
        questions = read_questions("train", config.data.train_files, config, tokenizer)
        with _room(config, tokenizer, dtype=_verify_dtype(config)) as room:
            room.engine.update_weights(room.policy.named_weights, 0)
            report = verify_mini_batch(config, room.policy, room.engine, room.grader, objective, questions)
            if _first():
                print(report)
    return 0


# --- parts ---


@contextlib.contextmanager
def _started(config: RunConfig) -> Iterator[None]:
    parallel.start(config.model, config.seed)
    try:
        yield
    except BaseException:
        parallel.stop(failed=True)
        raise
    parallel.stop()


@contextlib.contextmanager
def _held(run: RunDirectory) -> Iterator[None]:
    """Rank 0 holds the run directory; the others start when it does."""
    with run.lock() if _first() else contextlib.nullcontext():
        dist.barrier()
        yield


@contextlib.contextmanager
def _room(
    config: RunConfig,
    tokenizer: Any,
    *,
    dtype: torch.dtype | None = None,
    trainable: bool = True,
    checkpoint_path: Path | None = None,
) -> Iterator[Room]:
    """checkpoint_path: where the weights are, if not in model.path."""
    policy = _policy(config, tokenizer, dtype=dtype, trainable=trainable, read_weights=checkpoint_path is None)
    if checkpoint_path is not None:
        checkpoint.load(policy, checkpoint_path)
    engine = build_engine(
        config.generation,
        policy,
        stop_token_ids(tokenizer, config.model.path),
        max_length=config.data.max_prompt_length + config.generation.longest_response,
        logs=RunDirectory(config.exp_manager.explicit_log_dir).path / "engines",
    )
    try:
        with build_verifier(config.reward, rank_workers(config.reward.workers)) as grader:
            yield Room(policy, engine, grader)
    finally:
        engine.close()


def _policy(
    config: RunConfig,
    tokenizer: Any,
    *,
    dtype: torch.dtype | None = None,
    trainable: bool = True,
    read_weights: bool = True,
) -> Policy:
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
    )


def read_questions(
    name: str, files: Sequence[str], config: RunConfig, tokenizer: Any, weights: Sequence[float] | None = None
) -> Questions:
    """Questions and their prompts; what is left out is said, by rank 0."""
    loaded = load_questions(files, weights, config.data.max_bad_records)
    kept, notes = encode_prompts(
        tokenizer,
        loaded.questions,
        suffix=config.data.prompt_suffix,
        max_prompt_length=config.data.max_prompt_length,
        too_long=config.data.too_long,
        system=config.data.system_prompt,
        template_arguments=config.data.chat_template_kwargs,
        vocabulary=read_shape(config.model.path).vocab,
    )
    for note in (*loaded.notes, *notes):
        log.warning("%s", note) if _first() else None
    return Questions(name, [p.question for p in kept], [p.token_ids for p in kept], tokenizer)


def _evaluation_sets(config: RunConfig, tokenizer: Any) -> list[Questions]:
    names = [file_stem(Path(file).stem) for file in config.evaluation.files]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"evaluation.files: two files are named {twice[0]} where results are written; rename one")
    sets = [read_questions(Path(file).stem, [file], config, tokenizer) for file in config.evaluation.files]
    most = config.evaluation.max_questions
    return [s.repeat(range(min(len(s), most or len(s))), 1) for s in sets]


def _export(policy: Policy, run: RunDirectory, step: int) -> None:
    """Write RUN/export, unless it is of this step and younger than the last checkpoint, whose weights it has then. A
    collective."""
    record: ModelRecord = {"step": step}
    there = [
        _first() and read_record(run.export) == record and _younger(run.export, checkpoint.latest(run.checkpoints))
    ]
    dist.broadcast_object_list(there, src=0)
    if not there[0]:
        policy.export(run.export, as_files(record))
    elif _first():
        os.utime(run.export)  # by the directory's time slurm/lib.sh knows that this life of the job reached the end


def _younger(export: Path, saved: Path | None) -> bool:
    weights = [file.stat().st_mtime for file in export.glob("*.safetensors")]
    return saved is not None and bool(weights) and min(weights) > (saved / checkpoint_files.RECORD).stat().st_mtime


def _refuse_used(run: RunDirectory, config: RunConfig) -> None:
    if not config.exp_manager.resume_if_exists and checkpoint.latest(run.checkpoints) is not None:
        raise UserError(
            f"{run.path} holds checkpoints of an earlier run and exp_manager.resume_if_exists is false: "
            "set exp_manager.explicit_log_dir to a new directory, or let it resume"
        )


def _resume(algorithm: DisCO, run: RunDirectory, config: RunConfig) -> None:
    """Go on from the newest intact checkpoint, if there is one; settings that changed since are said."""
    found = checkpoint.load_latest(algorithm.policy, run.checkpoints, algorithm.reference)
    if found is None:
        return
    algorithm.load_state_dict(found[1])
    if _first():
        log.info("resumed from step %d of %s", algorithm.step, run.checkpoints)
        try:
            if changed := changes(load_run_config(run.config), config):
                log.warning("other settings than before: %s", "; ".join(changed))
        except UserError as error:  # another version's config.yaml, a damaged one, or none
            log.warning("whether settings changed is not known: %s", error)


def _objective(config: RunConfig) -> Objective:
    """Raises UserError for an objective that needs what nobody here computes."""
    objective = build_objective(config.algorithm.objective())
    if lacking := sorted(objective.needs - PROVIDED):
        raise UserError(
            f"objective {objective.name} needs {' and '.join(lacking)}, which this version does not compute; "
            "take another objective, or its setting that does without"
        )
    return objective


def _show(run: RunDirectory) -> None:
    """The before/after table, the report, and where the trained model is."""
    from rich.console import Console

    from nemo_disco.evaluation.report import write_report
    from nemo_disco.evaluation.table import compare, rich_table, setup_differences

    console = Console()
    if not console.is_terminal:
        console = Console(width=110)  # a log has no width of its own, and the table must not be cut
    by_set: dict[str, list[EvaluationResult]] = {}
    for result in read_evaluations(run.evaluation):
        by_set.setdefault(result.name, []).append(result)
    for name, results in by_set.items():
        if len(results) > 1:
            title = f"{name}: {results[0].problems} problems, before and after {results[-1].step} steps"
            console.print(rich_table(compare(results[0], results[-1]), title))
            if note := setup_differences(results[0], results[-1]):
                console.print(note, soft_wrap=True, highlight=False, markup=False)
    console.print(f"report   {write_report([run.path])}", soft_wrap=True, highlight=False)
    console.print(f"model    {run.export} (a Hugging Face directory)", soft_wrap=True, highlight=False)


def _delta(objective: Objective) -> float | None:
    constraint = objective.constraint
    return constraint.delta if constraint.kind == "squared_hinge" else None


def _verify_dtype(config: RunConfig) -> torch.dtype | None:
    return getattr(torch, config.verify.dtype) if config.verify.dtype else None


def _first() -> bool:
    return dist.get_rank() == 0
