"""Validation during training: each evaluation set once a step, however often the run is started again.

Touches the engine and the grader through the Evaluator, and the run's evaluation/ directory; decides no step.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nemo_disco.algorithms.journal import Journal
from nemo_disco.evaluation.result import EvaluationResult, evaluation_file, read_evaluation
from nemo_disco.models.source import model_source
from nemo_disco.rollout.evaluation import Evaluator, weights_identity
from nemo_disco.rollout.prompts import PromptSet
from nemo_disco.runtime.collectives import is_first_rank, on_first_rank
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.files import remove, writing

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Validation:
    """Scores the policy on the evaluation sets of a run. model_path: the directory of the weights of step 0."""

    evaluator: Evaluator
    sets: Sequence[PromptSet]
    journal: Journal
    model_path: str

    @property
    def every_n_steps(self) -> int:
        """evaluation.every_n_steps; 0 is only before and after training."""
        return self.evaluator.config.every_n_steps

    @property
    def temperature(self) -> float:
        """evaluation.temperature."""
        return self.evaluator.config.temperature

    def run(self, step: int, must_stop: Callable[[], bool]) -> list[EvaluationResult] | None:
        """Score the present weights on every set; None if `must_stop`, called before each batch of samples, is True.

        Results and samples of an earlier process of this run are used again, with a line in the log. A collective.
        """
        results = []
        for prompts in self.sets:
            weights = weights_identity(model_source(self.model_path)) if step == 0 else {"training_step": step}
            path = evaluation_file(self.journal.run.evaluation, prompts.name, step)
            samples = path.with_suffix(".samples.jsonl")
            result = on_first_rank(partial(self._earlier_result, path, prompts, step, weights))
            if result is None:
                result = self.evaluator.evaluate(prompts, step, samples, weights, must_stop)
            if result is None:
                return None
            results.append(result)
            self.journal.write_evaluation(result)
            if is_first_rank():
                with writing(samples):
                    remove(samples)  # the verdicts are in the result
        return results

    def _earlier_result(
        self, path: Path, prompts: PromptSet, step: int, weights: dict[str, Any]
    ) -> EvaluationResult | None:
        """The result that an earlier process wrote, if it is of this evaluation."""
        if not path.exists():
            return None
        try:
            result = read_evaluation(path)
        except UserError as error:
            log.warning("%s; the set is evaluated again", error)
            return None
        if result.identity != json.loads(json.dumps(self.evaluator.identity(prompts, step) | weights)):
            return None
        log.info("%s: the result of an earlier process is used, nothing is sampled again", path)
        return result
