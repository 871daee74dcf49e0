"""Scoring the policy while it trains: each set once a step, whatever the number of lives.

Touches the engine and the grader through evaluate_set, and the run's evaluation/; decides no step.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nemo_disco.algorithms.journal import Journal
from nemo_disco.config.schema import RunConfig
from nemo_disco.evaluation.result import EvaluationResult, evaluation_file, read_evaluation
from nemo_disco.generation.engine import Engine
from nemo_disco.models.source import model_source
from nemo_disco.rewards.registry import Grader
from nemo_disco.rollout.evaluation import evaluate_set, identity, weights_identity
from nemo_disco.rollout.prompts import PromptSet
from nemo_disco.runtime.collectives import first
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.files import remove, writing

log = logging.getLogger(__name__)


class Validation:
    """The evaluation sets of a run."""

    def __init__(
        self, config: RunConfig, *, engine: Engine, grader: Grader, sets: Sequence[PromptSet], journal: Journal
    ) -> None:
        self.config, self.engine, self.grader, self.sets, self.journal = config, engine, grader, sets, journal

    def run(self, step: int, stopped: Callable[[], bool]) -> list[EvaluationResult] | None:
        """Score the present weights on every set; None where `stopped`, asked before each batch of samples, says so.

        What an earlier life of this evaluation wrote is not sampled again, and this is said. A collective.
        """
        results = []
        for questions in self.sets if self.config.evaluation.enabled else ():
            weights = weights_identity(model_source(self.config.model.path)) if step == 0 else {"training_step": step}
            result = first(lambda q=questions, w=weights: self._earlier_result(q, step, w))  # type: ignore[misc]
            if result is None:
                stream = (self._samples(questions.name, step), weights)
                result = evaluate_set(
                    self.engine, self.grader, questions, self.config, step=step, stream=stream, stopped=stopped
                )
            if result is None:
                return None
            results.append(result)
            self.journal.evaluated([result])
            if dist.get_rank() == 0:
                samples = self._samples(questions.name, step)
                with writing(samples):
                    remove(samples)  # the verdicts are in the result
        return results

    def _earlier_result(self, questions: PromptSet, step: int, weights: dict[str, Any]) -> EvaluationResult | None:
        """The result that an earlier life wrote, if it is of this evaluation."""
        path = evaluation_file(self.journal.run.evaluation, questions.name, step)
        if not path.exists():
            return None
        try:
            result = read_evaluation(path)
        except UserError as error:
            log.warning("%s; it is made again", error)
            return None
        if result.identity != json.loads(json.dumps(identity(questions, self.config, step) | weights)):
            return None
        log.info("%s: the result of an earlier life is used, nothing is sampled again", path)
        return result

    def _samples(self, name: str, step: int) -> Path:
        return evaluation_file(self.journal.run.evaluation, name, step).with_suffix(".samples.jsonl")
