"""Scoring a policy on one set: k samples and a greedy response a question, in batches, streamed to disk and resumable.

Touches an engine and a grader through their contracts. The seeds decide every sample, whatever the batch or the life.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from nemo_disco.algorithms.early_grades import EarlyGrades
from nemo_disco.algorithms.sampling import Questions, grade, sample_responses
from nemo_disco.config.model_source import ModelSource
from nemo_disco.config.schema import RunConfig
from nemo_disco.evaluation.result import EvaluationResult
from nemo_disco.evaluation.samples import Sample, SampleFile
from nemo_disco.generation.engine import Engine, Sampling
from nemo_disco.rewards.registry import Grader
from nemo_disco.rewards.votes import votes

BATCH = 2048  # samples that are asked for together: what a kill costs


def evaluate_set(
    engine: Engine,
    grader: Grader,
    questions: Questions,
    config: RunConfig,
    step: int,
    stream: tuple[Path, Mapping[str, Any]] | None = None,
) -> EvaluationResult:
    """k samples and one greedy response to every question of a set, graded. The same seeds at every step. A collective.

    stream: the file that takes the samples, and what the weights are: where the file holds batches of the same
    evaluation, these are not sampled again.
    """
    k = config.evaluation.samples
    size = max(1, BATCH // k)
    batches = [list(range(i, min(i + size, len(questions)))) for i in range(0, len(questions), size)]
    file = None
    if stream is not None and dist.get_rank() == 0:
        identity = _identity(questions, config, step) | dict(stream[1])
        file = SampleFile(stream[0], identity, [len(batch) * (k + 1) for batch in batches])
    done: list[Any] = [file.done if file else []]
    dist.broadcast_object_list(done, src=0)
    samples: list[Sample] = [sample for batch in done[0] for sample in batch]
    seeds = np.random.SeedSequence((config.seed, 2**32 - 1)).generate_state(len(questions) * k, np.uint64) >> 1
    for batch in batches[len(done[0]) :]:
        fresh = _batch(engine, grader, questions, batch, seeds, config)
        if file is not None:
            file.append(fresh)
        samples += fresh
    if file is not None:
        file.close()
    return _result(questions.name, step, samples, k)


def _batch(
    engine: Engine, grader: Grader, questions: Questions, batch: list[int], seeds: Any, config: RunConfig
) -> list[Sample]:
    """The k samples of each question of the batch, then its greedy ones."""
    k, limit = config.evaluation.samples, config.generation.longest_response
    sampled = Sampling(config.evaluation.temperature, limit, config.evaluation.top_p)
    own_seeds = [int(seeds[i * k + j]) for i in batch for j in range(k)]
    rows: list[Sample] = []
    for times, sampling, picked_seeds in ((k, sampled, own_seeds), (1, Sampling(0.0, limit), [0] * len(batch))):
        picked = questions.repeat(batch, times)
        early = EarlyGrades(grader, picked)
        rollouts, texts = sample_responses(engine, picked, picked_seeds, sampling, early.finished)
        rewards = early.collect(texts, partial(grade, grader))
        for i, (text, reward) in enumerate(zip(texts, rewards, strict=True)):
            question = picked.questions[i]
            rows.append(
                {
                    "question_id": question.id,
                    "question": question.messages[-1].content,
                    "answer": list(question.answers),
                    "sample": i % times if sampling is sampled else "greedy",
                    "response": text,
                    "reward": reward,
                    "correct": reward > config.algorithm.threshold,
                    "length": int(rollouts.response_lengths[i]),
                    "truncated": bool(rollouts.truncated[i]),
                }
            )
    return rows


def _result(name: str, step: int, samples: list[Sample], k: int) -> EvaluationResult:
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
    )


def weights_identity(source: ModelSource) -> dict[str, Any]:
    """Which weights these are, as files: their place, sizes and times of writing."""
    place = source.checkpoint or Path(source.hugging_face)
    files = sorted(place.glob("*.safetensors") if source.checkpoint is None else [place / "checkpoint.json"])
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return {"weights": [str(place.resolve()), *map(list, stats)]}


def _identity(questions: Questions, config: RunConfig, step: int) -> dict[str, Any]:
    """What decides the samples, but for the weights."""
    asked = json.dumps([[list(map(int, p)) for p in questions.prompts], [q.answers for q in questions.questions]])
    return {
        "set": questions.name,
        "step": step,
        "seed": config.seed,
        "questions": hashlib.sha256(asked.encode()).hexdigest(),
        "evaluation": config.evaluation.model_dump(include={"samples", "temperature", "top_p"}),
        "max_response_length": config.generation.longest_response,
        "engine": config.generation.engine,
        "reward": config.reward.model_dump(exclude={"timeout", "workers"}),
    }
