"""Evaluation of the policy on a set of prompts: k samples and a greedy response to each, in batches, streamed to disk.

Touches an engine and a grader through their contracts. The seeds decide every sample, so that an evaluation that was
killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from nemo_disco.config.schema import EvaluationConfig
from nemo_disco.evaluation.result import EvaluationResult
from nemo_disco.evaluation.samples import EvaluationSample, SampleStream
from nemo_disco.generation.engine import Engine, Response, SamplingParams
from nemo_disco.models.source import ModelSource
from nemo_disco.rewards.grader import Grader
from nemo_disco.rewards.votes import assign_votes
from nemo_disco.rollout.grading import EarlyGrading
from nemo_disco.rollout.prompts import PromptSet
from nemo_disco.rollout.response_warnings import ResponseWarnings
from nemo_disco.runtime.collectives import is_first_rank, on_first_rank
from nemo_disco.runtime.stop_signals import StoppedError

log = logging.getLogger(__name__)
BATCH = 2048  # samples requested together
GREEDY = -1  # in place of a sample's number


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Samples and grades responses to the prompts of a set. The same seeds at every step.

    threshold: a response is correct when its grade is above. settings: others that decide the samples.
    """

    config: EvaluationConfig
    engine: Engine
    grader: Grader
    max_response_length: int
    seed: int
    threshold: float
    settings: Mapping[str, Any]

    def identity(self, prompts: PromptSet, step: int) -> dict[str, Any]:
        """All settings and data that decide the samples and their verdicts, except the weights. JSON types."""
        questions = [[list(map(int, p)) for p in prompts.prompts], [q.answers for q in prompts.questions]]
        return {
            "set": prompts.name,
            "step": step,
            "seed": self.seed,
            "questions": hashlib.sha256(json.dumps(questions).encode()).hexdigest(),
            "evaluation": self.config.model_dump(include={"samples", "temperature", "top_p"}),
            "max_response_length": self.max_response_length,
            "threshold": self.threshold,
            **self.settings,
        }

    def evaluate(
        self,
        prompts: PromptSet,
        step: int,
        path: Path,
        weights: Mapping[str, Any],
        must_stop: Callable[[], bool] = lambda: False,
        warnings: ResponseWarnings | None = None,
    ) -> EvaluationResult | None:
        """k samples and one greedy response to every prompt, graded. A collective.

        path: of the file that takes the samples; samples of the same evaluation in it are not sampled again. weights:
        their identity (`weights_identity`, for weights in files). must_stop: called before each batch, the same on
        every rank; True makes the result None, as does a user's verifier that takes too long after a request to stop.
        warnings: rank 0 logs them.
        """
        k = self.config.samples
        size = max(1, BATCH // k)
        batches = [range(i, min(i + size, len(prompts))) for i in range(0, len(prompts), size)]
        identity = self.identity(prompts, step) | dict(weights)
        sequence = np.random.SeedSequence((self.seed, 2**32 - 1))
        seeds = sequence.generate_state(len(prompts) * k, np.uint64) >> 1
        sizes = [len(batch) * (k + 1) for batch in batches]
        with SampleStream(path, identity, sizes, dist.get_rank(), lambda item: on_first_rank(lambda: item)) as samples:
            for number in range(len(samples.batches), len(batches)):
                if must_stop():
                    return None
                try:
                    samples.append(self._evaluate_batch(prompts, batches[number], seeds, samples))
                except StoppedError:
                    return None
            all_samples = [sample for batch in samples.batches for sample in batch]
        if warnings is not None and is_first_rank():
            for warning in warnings.new_warnings([s["response"] for s in all_samples]):
                log.warning("%s", warning)
        return _result(prompts.name, step, all_samples, k, identity)

    def _evaluate_batch(
        self, prompts: PromptSet, batch: range, seeds: NDArray[Any], stream: SampleStream
    ) -> list[EvaluationSample]:
        """The k samples of each prompt of the batch, then the greedy ones. Those that the stream has are not requested,
        and those that an engine finishes early go to the stream at once."""
        k, limit = self.config.samples, self.max_response_length
        rows = [(i, j) for i in batch for j in range(k)] + [(i, GREEDY) for i in batch]
        samples = dict(stream.recovered)
        for sampling in (SamplingParams(self.config.temperature, limit, self.config.top_p), SamplingParams(0.0, limit)):
            greedy = sampling.temperature == 0.0
            indices = [n for n, (_, j) in enumerate(rows) if (j == GREEDY) == greedy and n not in samples]
            if not indices:
                continue
            request = _EvaluationRequest(prompts.select([rows[n][0] for n in indices]), indices, rows, self.threshold)
            grading = EarlyGrading(self.grader, request.prompts, request.writer(stream))
            row_seeds = [0 if greedy else int(seeds[i * k + j]) for i, j in (rows[n] for n in indices)]
            responses = self.engine.generate(request.prompts.prompts, row_seeds, sampling, grading.finished)
            grades = grading.collect(responses)
            for place, (response, grade) in enumerate(zip(responses, grades, strict=True)):
                samples[indices[place]] = request.sample(place, response, grading.texts[place], grade)
        return [samples[n] for n in range(len(rows))]


@dataclass(frozen=True)
class _EvaluationRequest:
    """One request of a batch. rows: (question, number of the sample) of each row of the batch; indices: the
    places in `rows` of this request's prompts, in their order."""

    prompts: PromptSet
    indices: Sequence[int]
    rows: Sequence[tuple[int, int]]
    threshold: float

    def sample(self, place: int, response: Response, text: str, grade: float) -> EvaluationSample:
        """The graded response to the prompt at index `place` of the request."""
        question, number = self.prompts.questions[place], self.rows[self.indices[place]][1]
        return {
            "question_id": question.id,
            "question": question.messages[-1].content,
            "answer": list(question.answers),
            "sample": "greedy" if number == GREEDY else number,
            "response": text,
            "reward": grade,
            "correct": grade > self.threshold,
            "length": len(response.tokens),
            "truncated": response.finish_reason == "length",
        }

    def writer(self, stream: SampleStream) -> Callable[[int, Response, str, float], None]:
        """Writes a graded response to the stream."""
        return lambda place, *graded: stream.add(self.indices[place], self.sample(place, *graded))


def _result(
    name: str, step: int, samples: list[EvaluationSample], k: int, identity: dict[str, Any]
) -> EvaluationResult:
    drawn = [s for s in samples if s["sample"] != "greedy"]
    questions = [drawn[i : i + k] for i in range(0, len(drawn), k)]
    return EvaluationResult(
        name=name,
        step=step,
        correct=np.array([[s["correct"] for s in question] for question in questions]),
        lengths=np.array([[s["length"] for s in question] for question in questions]),
        truncated=np.array([[s["truncated"] for s in question] for question in questions]),
        greedy_correct=np.array([s["correct"] for s in samples if s["sample"] == "greedy"]),
        votes=np.array([assign_votes([s["response"] for s in question]) for question in questions]),
        identity=identity,
    )


def weights_identity(source: ModelSource) -> dict[str, Any]:
    """The identity of weights in files: their directory, and each file's name, size and time of writing."""
    place = source.checkpoint or Path(source.hugging_face)
    names = ("*.safetensors", "*.json", "*.jinja") if source.checkpoint is None else ("checkpoint.json",)
    files = sorted(file for name in names for file in place.glob(name) if file.is_file())
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return {"weights": [str(place.resolve()), *map(list, stats)]}
