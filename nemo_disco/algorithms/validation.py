"""Scoring the policy while it trains: each set once a step, whatever the number of lives, and which weights are best.

Touches the engine and the grader through evaluate_set, and the run's evaluation/ and best/; decides no step.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from nemo_disco.algorithms.benchmark import evaluate_set, identity, weights_identity
from nemo_disco.algorithms.journal import Journal
from nemo_disco.algorithms.sampling import Questions
from nemo_disco.config.model_source import model_source
from nemo_disco.config.schema import RunConfig
from nemo_disco.evaluation.result import EvaluationResult, evaluation_file, read_evaluation
from nemo_disco.generation.engine import Engine
from nemo_disco.policy.together import first
from nemo_disco.rewards.registry import Grader
from nemo_disco.runtime.errors import UserError

log = logging.getLogger(__name__)


class Validation:
    """The evaluation sets of a run. `best`: the highest mean Pass@1 so far (score), where (step), and of which sets,
    sampled and judged how (of, a hash): scores of other sets are not compared with it."""

    def __init__(
        self, config: RunConfig, *, engine: Engine, grader: Grader, sets: Sequence[Questions], journal: Journal
    ) -> None:
        self.config, self.engine, self.grader, self.sets, self.journal = config, engine, grader, sets, journal
        self.best: dict[str, Any] | None = None

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
                self._samples(questions.name, step).unlink(missing_ok=True)  # the verdicts are in the result
        return results

    def improved(self, step: int, results: Sequence[EvaluationResult]) -> bool:
        """Whether the weights of now have the highest mean Pass@1 so far; it is remembered."""
        if not results:
            return False
        score, of = float(np.mean([result.correct.mean() for result in results])), _of(results)
        if self.best is not None and self.best["of"] != of:
            self._begin_anew(step)
        if self.best is not None and score <= self.best["score"]:
            return False
        self.best = {"score": score, "step": step, "of": of}
        return True

    def load_state(self, best: Any) -> None:
        """best: of a checkpoint; a number alone, of an earlier version, is compared with nothing."""
        self.best = best if isinstance(best, dict) else None

    def _begin_anew(self, step: int) -> None:
        """Another choice begins; what the last one chose is kept beside it."""
        assert self.best is not None
        run, old = self.journal.run, self.best["step"]
        kept = run.path / f"best.step_{old}"

        def keep() -> bool:
            if not run.best.is_dir() or kept.exists():
                return False
            run.best.rename(kept)
            return True

        where = f"; {run.best} of step {old} is now {kept}" if first(keep) else ""
        self.journal.say(f"step {step}: the evaluations are others than before: the best is chosen anew{where}")
        self.best = None

    def _earlier_result(self, questions: Questions, step: int, weights: dict[str, Any]) -> EvaluationResult | None:
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


def _of(results: Sequence[EvaluationResult]) -> str:
    """A hash of the evaluation sets and of how they are sampled and judged; the weights do not count."""
    said = [
        {k: v for k, v in (r.identity or {}).items() if k not in ("step", "weights", "training_step")} for r in results
    ]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
