"""Scoring a policy on one set: k samples and a greedy response a question, in batches, streamed to disk and resumable.

Touches an engine and a grader through their contracts. The seeds decide every sample, whatever the batch or the life.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from nemo_disco.config.schema import RunConfig
from nemo_disco.evaluation.result import EvaluationResult
from nemo_disco.evaluation.samples import EvaluationSample, SampleStream
from nemo_disco.generation.engine import Engine, Response, SamplingParams
from nemo_disco.models.source import ModelSource
from nemo_disco.rewards.registry import Grader, verifier_code
from nemo_disco.rewards.votes import votes
from nemo_disco.rollout.grading import EarlyGrades, grade
from nemo_disco.rollout.prompts import PromptSet
from nemo_disco.rollout.requests import sample_responses
from nemo_disco.rollout.response_warnings import ResponseWarnings
from nemo_disco.runtime.signals import StoppedError

log = logging.getLogger(__name__)
_ENGINE = ("engine", "quantization", "options", "tensor_parallel_size")
_MODEL = ("fp8", "transformer_engine", "apply_rope_fusion", "bias_activation_fusion", "trust_remote_code")
BATCH = 2048  # samples that are asked for together


def evaluate_set(
    engine: Engine,
    grader: Grader,
    questions: PromptSet,
    config: RunConfig,
    step: int,
    stream: tuple[Path, Mapping[str, Any]] | None = None,
    stopped: Callable[[], bool] = lambda: False,
    warnings: ResponseWarnings | None = None,
) -> EvaluationResult | None:
    """k samples and one greedy response to every question of a set, graded. The same seeds at every step. A collective.

    stream: the file that takes the samples, and what the weights are: where the file holds samples of the same
    evaluation, these are not sampled again. stopped: asked before each batch, the same on every rank; then the result
    is None, as where a user's verifier takes too long after a request to stop. warnings: those that rank 0 logs about
    the responses.
    """
    k = config.evaluation.samples
    size = max(1, BATCH // k)
    batches = [list(range(i, min(i + size, len(questions)))) for i in range(0, len(questions), size)]
    whole = identity(questions, config, step) | dict(stream[1] if stream else {})
    seeds = np.random.SeedSequence((config.seed, 2**32 - 1)).generate_state(len(questions) * k, np.uint64) >> 1
    sizes = [len(batch) * (k + 1) for batch in batches]
    with SampleStream(stream[0] if stream else None, whole, sizes, dist.get_rank(), _of_rank_0) as samples:
        for number in range(len(samples.batches), len(batches)):
            if stopped():
                return None
            try:
                samples.append(_batch(engine, grader, questions, batches[number], seeds, config, samples))
            except StoppedError:
                return None
        all_samples = samples.samples()
    if warnings is not None and dist.get_rank() == 0:
        for warning in warnings.about([s["response"] for s in all_samples], mixed=1.0):  # nothing is to be learned here
            log.warning("%s", warning)
    return _result(questions.name, step, all_samples, k, whole)


def _batch(
    engine: Engine,
    grader: Grader,
    questions: PromptSet,
    batch: list[int],
    seeds: Any,
    config: RunConfig,
    stream: SampleStream,
) -> list[EvaluationSample]:
    """The k samples of each question of the batch, then its greedy ones; those that the stream has are not asked for,
    and what an engine hands over goes to it as it comes."""
    k, limit = config.evaluation.samples, config.generation.longest_response
    rows = [(i, j) for i in batch for j in range(k)] + [(i, -1) for i in batch]
    drawn, greedy = (
        SamplingParams(config.evaluation.temperature, limit, config.evaluation.top_p),
        SamplingParams(0.0, limit),
    )
    found = dict(stream.unfinished_batch())
    for sampling in (drawn, greedy):
        asked = [n for n, (_, j) in enumerate(rows) if (j < 0) == (sampling is greedy) and n not in found]
        if not asked:
            continue
        picked = questions.select([rows[n][0] for n in asked])
        make = partial(_sample, picked, [rows[n][1] for n in asked], config.algorithm.threshold)
        early = EarlyGrades(grader, picked, partial(_keep, stream, asked, make))
        own_seeds = [0 if j < 0 else int(seeds[i * k + j]) for i, j in (rows[n] for n in asked)]
        rollouts, texts = sample_responses(engine, picked, own_seeds, sampling, early.finished)
        rewards = early.collect(texts, partial(grade, grader))
        lengths, truncated = rollouts.response_lengths.tolist(), rollouts.truncated.tolist()
        for at, row in enumerate(asked):
            found[row] = make(at, texts[at], rewards[at], lengths[at], truncated[at])
    return [found[n] for n in range(len(rows))]


def _sample(
    picked: PromptSet, numbers: list[int], threshold: float, at: int, text: str, reward: float, length: int, cut: bool
) -> EvaluationSample:
    """numbers: of each question's samples, -1 for the greedy one."""
    question = picked.questions[at]
    return {
        "question_id": question.id,
        "question": question.messages[-1].content,
        "answer": list(question.answers),
        "sample": numbers[at] if numbers[at] >= 0 else "greedy",
        "response": text,
        "reward": reward,
        "correct": reward > threshold,
        "length": length,
        "truncated": cut,
    }


def _keep(
    stream: SampleStream,
    asked: list[int],
    make: Callable[..., EvaluationSample],
    at: int,
    of: Response,
    text: str,
    reward: float,
) -> None:
    """Write to the stream a response that the engine finished before the rest."""
    stream.add(asked[at], make(at, text, reward, len(of.tokens), of.finish_reason == "length"))


def _of_rank_0(mine: Any) -> Any:
    shared = [mine]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def _result(name: str, step: int, samples: list[EvaluationSample], k: int, whole: dict[str, Any]) -> EvaluationResult:
    drawn = [s for s in samples if s["sample"] != "greedy"]
    greedy = [s["correct"] for s in samples if s["sample"] == "greedy"]
    problems = [drawn[i : i + k] for i in range(0, len(drawn), k)]
    return EvaluationResult(
        name=name,
        step=step,
        correct=np.array([[s["correct"] for s in problem] for problem in problems]),
        lengths=np.array([[s["length"] for s in problem] for problem in problems]),
        truncated=np.array([[s["truncated"] for s in problem] for problem in problems]),
        greedy_correct=np.array(greedy),
        votes=np.array([votes([s["response"] for s in problem]) for problem in problems]),
        identity=whole,
    )


def weights_identity(source: ModelSource) -> dict[str, Any]:
    """Which weights these are, as files: their place, sizes and times of writing."""
    place = source.checkpoint or Path(source.hugging_face)
    names = ("*.safetensors", "*.json", "*.jinja") if source.checkpoint is None else ("checkpoint.json",)
    files = sorted(file for name in names for file in place.glob(name) if file.is_file())
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return {"weights": [str(place.resolve()), *map(list, stats)]}


def identity(questions: PromptSet, config: RunConfig, step: int) -> dict[str, Any]:
    """All settings and data that decide the samples and their verdicts, except the weights."""
    asked = json.dumps([[list(map(int, p)) for p in questions.prompts], [q.answers for q in questions.questions]])
    return {
        "set": questions.name,
        "step": step,
        "seed": config.seed,
        "questions": hashlib.sha256(asked.encode()).hexdigest(),
        "evaluation": config.evaluation.model_dump(include={"samples", "temperature", "top_p"}),
        "max_response_length": config.generation.longest_response,
        "engine": config.generation.model_dump(include=set(_ENGINE)),
        "precision": config.trainer.precision,
        "model": config.model.model_dump(include=set(_MODEL)),
        "reward": config.reward.model_dump(include={"verifier", "parameters", "require_think", "timeout"}),
        "verifier_code": verifier_code(config.reward),
        "threshold": config.algorithm.threshold,
    }
