"""This project's side of the comparisons: the trainer of `nemo-disco train`, on the benchmarks' model and prompts."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from common import as_text, grade_by_hash, make_prompts
from transformers import PreTrainedTokenizerFast

from nemo_disco.algorithms import build_objective
from nemo_disco.algorithms.journal import Journal
from nemo_disco.algorithms.trainer import Trainer
from nemo_disco.commands.components import Components
from nemo_disco.commands.train import build_trainer
from nemo_disco.config.compose import compose
from nemo_disco.config.schema import RunConfig
from nemo_disco.data.question_order import QuestionOrder
from nemo_disco.data.questions import Question
from nemo_disco.generation.megatron.engine import MegatronEngine
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy
from nemo_disco.rollout.prompts import PromptSet
from nemo_disco.runtime.rundir import RunDirectory


class HashGrader:
    """Grader that gives the rewards of common.grade_by_hash, as TRL's side does."""

    def grade(self, responses: Sequence[str], answers: Sequence[object]) -> list[float]:  # noqa: ARG002
        return [grade_by_hash(response) for response in responses]


def compose_config(model: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a run on this model, in one process and float32; `overrides` come last.

    The run's directory is a new temporary one inside the model's directory.
    """
    return compose(
        "config",
        [
            f"model.path={model}",
            "data.train_files=[none]",
            "trainer.precision=32",
            "evaluation.enabled=false",
            f"exp_manager.explicit_log_dir={tempfile.mkdtemp(dir=model)}",
            "generation.temperature=1.0",
            "model.optim.lr=1e-6",
            "verify.max_mismatch=1e300",  # made-up rollouts have made-up log-probs, which match no engine's
            "verify.max_kl=1e300",
            *overrides,
        ],
    )


def build_benchmark_trainer(config: RunConfig) -> Trainer:
    """Build the trainer of `nemo-disco train` in this process, with made-up questions and a grader that costs nothing.

    Sets PyTorch to one thread and starts the process groups.
    """
    torch.set_num_threads(1)
    parallel.start(config.model, config.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(config.model.path)
    prompts = make_prompts(config.data.questions_per_step)
    questions = [Question(i, as_text(prompt), ("",), "benchmark") for i, prompt in enumerate(prompts)]
    policy = Policy(
        config.model,
        temperature=config.generation.temperature,
        clip_grad=config.trainer.gradient_clip_val,
        total_optimizer_steps=config.trainer.max_steps,
    )
    run = RunDirectory(config.exp_manager.explicit_log_dir)
    run.create()
    engine = MegatronEngine(policy, [tokenizer.eos_token_id])
    return build_trainer(
        config,
        Components(policy, engine, HashGrader()),  # type: ignore[arg-type]
        build_objective(config.algorithm.objective()),
        prompts=PromptSet("benchmark", questions, prompts, tokenizer),
        order=QuestionOrder(len(prompts), config.data.questions_per_step, config.seed, config.data.shuffle),
        evaluation_sets=[],
        journal=Journal(run, config.exp_manager, writes=True, delta=None),
    )
