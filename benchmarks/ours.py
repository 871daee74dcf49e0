"""Our side of the benchmarks: the algorithm that `nemo-disco train` runs, on the benchmarks' model and prompts."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from common import as_text, prompts, reward
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


class FreeGrader:
    """Grades as the other side does (common.reward), at no cost."""

    def grade(self, responses: Sequence[str], answers: Sequence[object]) -> list[float]:  # noqa: ARG002
        return [reward(response) for response in responses]


def settings(model: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A run on this model: GRPO's and DisCO's common settings, one process, float32."""
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
            "verify.max_mismatch=1e300",  # rollouts that are made up are no engine's
            "verify.max_kl=1e300",
            *overrides,
        ],
    )


def build_algorithm(config: RunConfig) -> Trainer:
    """The trainer of `nemo-disco train`, with made-up questions and a grader that costs nothing."""
    torch.set_num_threads(1)
    parallel.start(config.model, config.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(config.model.path)
    asked = prompts(config.data.questions_per_step)
    questions = [Question(i, as_text(prompt), ("",), "benchmark") for i, prompt in enumerate(asked)]
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
        Components(policy, engine, FreeGrader()),  # type: ignore[arg-type]
        build_objective(config.algorithm.objective()),
        prompts=PromptSet("benchmark", questions, asked, tokenizer),
        order=QuestionOrder(len(asked), config.data.questions_per_step, config.seed, config.data.shuffle),
        evaluation_sets=[],
        journal=Journal(run, config.exp_manager, writes=True, delta=None),
    )
