"""`nemo-disco train`: train to the last step, export the policy, and print what changed."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence

import torch.distributed as dist

from nemo_disco import checkpoint
from nemo_disco.algorithms.agreement import Agreement
from nemo_disco.algorithms.journal import Journal
from nemo_disco.algorithms.objectives import Objective
from nemo_disco.algorithms.throughput import Throughput
from nemo_disco.algorithms.trainer import Trainer
from nemo_disco.algorithms.training_warnings import TrainingWarnings
from nemo_disco.algorithms.validation import Validation
from nemo_disco.checkpoint import files as checkpoint_files
from nemo_disco.commands import components
from nemo_disco.config.compose import changes, load_run_config, to_yaml
from nemo_disco.config.schema import RunConfig
from nemo_disco.data.question_order import QuestionOrder
from nemo_disco.data.tokenizer import load_tokenizer
from nemo_disco.estimate.flops import peak_flops
from nemo_disco.evaluation.result import EvaluationResult, file_stem, read_evaluations
from nemo_disco.models.shape import read_shape
from nemo_disco.policy.policy import Policy
from nemo_disco.policy.reference import Reference
from nemo_disco.rollout.prompts import PromptSet
from nemo_disco.runtime.collectives import is_first_rank, on_first_rank
from nemo_disco.runtime.earlier_life import set_aside
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.files import write_atomically
from nemo_disco.runtime.rundir import ModelRecord, RunDirectory, as_files, read_model_record

log = logging.getLogger(__name__)


def main(config: RunConfig) -> int:
    """Train in exp_manager.explicit_log_dir, from its last intact checkpoint if there is one."""
    run = RunDirectory(config.exp_manager.explicit_log_dir)
    objective = components.build_run_objective(config)
    with components.process_groups(config), components.lock_run_directory(run):
        # Every input is read and checked before the policy is built.
        _check_may_resume(run, config)
        tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
        components.check_compared_tokens(config, objective, tokenizer)
        data = config.data
        prompts = components.read_prompts("train", data.train_files, config, tokenizer, data.train_weights)
        weights = [q.weight for q in prompts.questions]
        per_step, content = data.questions_per_step, prompts.content()
        order = QuestionOrder(len(prompts), per_step, config.seed, data.shuffle, weights, content)
        evaluation_sets = components.read_evaluation_sets(config, tokenizer) if config.evaluation.enabled else []
        with components.build_components(config, tokenizer) as parts:
            reference = None
            if "reference_log_probs" in objective.needs:
                reference = Reference(components.build_policy(config, tokenizer, trainable=False))
            journal = _journal(run, config, objective)
            trainer = build_trainer(config, parts, objective, prompts, order, evaluation_sets, journal, reference)
            with contextlib.closing(trainer):
                _resume(trainer, run, config)
                run.check_lock()
                if is_first_rank():
                    if note := set_aside(run, trainer.step, [file_stem(s.name) for s in evaluation_sets]):
                        log.warning("%s", note)
                    write_atomically(run.config, to_yaml(config))
                trainer.fit()
                if trainer.finished:
                    run.check_lock()
                    _export(parts.policy, run, trainer.step)
                    if is_first_rank():
                        _print_outcome(run)
    return 0


def build_trainer(
    config: RunConfig,
    parts: components.Components,
    objective: Objective,
    prompts: PromptSet,
    order: QuestionOrder,
    evaluation_sets: Sequence[PromptSet],
    journal: Journal,
    reference: Reference | None = None,
) -> Trainer:
    """The trainer, each part of which gets its own section of the configuration."""
    policy, rounds = parts.policy, config.algorithm.dynamic_sampling_rounds
    return Trainer(
        config.trainer,
        config.exp_manager,
        config.algorithm,
        policy=policy,
        engine=parts.engine,
        objective=objective,
        collector=components.build_collector(config, parts, objective, prompts, order, journal.log, rounds),
        validation=Validation(components.build_evaluator(config, parts), evaluation_sets, journal, config.model.path),
        agreement=Agreement(config.verify, config.generation, policy, prompts.tokenizer),
        throughput=Throughput(read_shape(config.model.path), dist.get_world_size(), peak_flops(policy.device_name)),
        warnings=TrainingWarnings(config.reward.require_think),
        journal=journal,
        reference=reference,
        asynchronous=config.generation.asynchronous,
    )


def _journal(run: RunDirectory, config: RunConfig, objective: Objective) -> Journal:
    constraint = objective.constraint
    return Journal(
        run,
        config.exp_manager,
        writes=is_first_rank(),
        delta=constraint.limit,
        settings=config.model_dump(mode="json", by_alias=True),
    )


def _check_may_resume(run: RunDirectory, config: RunConfig) -> None:
    if not config.exp_manager.resume_if_exists and checkpoint.latest(run.checkpoints) is not None:
        raise UserError(
            f"{run.path} holds checkpoints of an earlier run and exp_manager.resume_if_exists is false: "
            "set exp_manager.explicit_log_dir to a new directory, or let it resume"
        )


def _resume(trainer: Trainer, run: RunDirectory, config: RunConfig) -> None:
    """Load the newest intact checkpoint, if there is one; rank 0 logs the settings that changed since."""
    loaded = checkpoint.load_latest(trainer.policy, run.checkpoints, trainer.reference)
    if loaded is None:
        return
    trainer.load_state_dict(loaded[1])
    if is_first_rank():
        log.info("resumed from step %d of %s", trainer.step, run.checkpoints)
        try:
            if changed := changes(load_run_config(run.config), config):
                log.warning("settings changed since the last start: %s", "; ".join(changed))
        except UserError as error:  # another version's config.yaml, a damaged one, or none
            log.warning("settings cannot be compared with those of the last start: %s", error)


def _export(policy: Policy, run: RunDirectory, step: int) -> None:
    """Write RUN/export, unless it is of this step and younger than the last checkpoint: then it has these weights.

    A collective.
    """
    record: ModelRecord = {"step": step}
    if not on_first_rank(lambda: read_model_record(run.export) == record and _is_younger(run)):
        policy.export(run.export, as_files(record))
    elif is_first_rank():
        os.utime(run.export)  # slurm/lib.sh reads from the directory's time that this life of the job reached the end


def _is_younger(run: RunDirectory) -> bool:
    saved, weights = checkpoint.latest(run.checkpoints), [f.stat().st_mtime for f in run.export.glob("*.safetensors")]
    return saved is not None and bool(weights) and min(weights) > (saved / checkpoint_files.RECORD).stat().st_mtime


def _print_outcome(run: RunDirectory) -> None:
    """Print the before/after table of each evaluation set, and the paths of the report and of the trained model."""
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
            step = results[-1].step
            title = f"{name}: {results[0].questions} questions, before and after {step} step{'s' * (step != 1)}"
            console.print(rich_table(compare(results[0], results[-1]), title))
            if note := setup_differences(results[0], results[-1]):
                console.print(note, soft_wrap=True, highlight=False, markup=False)
    console.print(f"report   {write_report([run.path])}", soft_wrap=True, highlight=False)
    console.print(f"model    {run.export} (a Hugging Face directory)", soft_wrap=True, highlight=False)
