"""Result of evaluating one set at one step, as raw matrices, so that every statistic can be computed again later.

A result is a JSON file in RUN/evaluation/. Reads and writes only files that the caller names.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from typing_extensions import TypedDict

from nemo_disco.evaluation.statistics import Estimate, avg_at_k, bootstrap, maj_at_k, pass_at_k
from nemo_disco.runtime.files import write_atomically
from nemo_disco.runtime.saved_files import Count, FileError, read_json

log = logging.getLogger(__name__)
Bit = Literal[0, 1]
Vote = Annotated[int, Field(ge=-1, le=2**31)]


class _SavedResult(TypedDict):
    """The fields of an evaluation's file that are read."""

    name: str
    step: Count
    correct: list[list[Bit]]
    lengths: list[list[Count]]
    truncated: list[list[Bit]]
    greedy_correct: NotRequired[list[Bit] | None]
    votes: NotRequired[list[list[Vote]] | None]
    identity: NotRequired[dict[str, Any] | None]


@dataclass(frozen=True)
class EvaluationResult:
    """Verdicts and lengths of K samples of each of P questions, in the set's order.

    name: the set's; step: training step of the weights (0: before training).
    correct [P, K] bool; lengths [P, K] int64, response tokens; truncated [P, K] bool: cut by the length limit.
    greedy_correct [P] bool, or None without greedy samples.
    votes [P, K] int64, or None: equal numbers for equal answers to a question, -1 for samples without an answer.
    identity: all settings and data that decide samples and verdicts, as JSON; None in a file written by hand.
    Raises ValueError if the shapes disagree.
    """

    name: str
    step: int
    correct: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    truncated: NDArray[np.bool_]
    greedy_correct: NDArray[np.bool_] | None = None
    votes: NDArray[np.int64] | None = None
    identity: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        types = {"correct": bool, "lengths": np.int64, "truncated": bool, "greedy_correct": bool, "votes": np.int64}
        for name, dtype in types.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, np.asarray(value, dtype=dtype))
        votes = {self.votes.shape} if self.votes is not None else set()
        shapes = {self.correct.shape, self.lengths.shape, self.truncated.shape} | votes
        if len(shapes) != 1 or self.correct.ndim != 2 or not self.correct.size:
            raise ValueError(
                f"evaluation {self.name}: correct, lengths, truncated and votes need one shape [P, K], not {shapes}"
            )
        if self.greedy_correct is not None and self.greedy_correct.shape != self.correct.shape[:1]:
            raise ValueError(
                f"evaluation {self.name}: {self.greedy_correct.shape} greedy verdicts for {len(self.correct)} questions"
            )

    @property
    def questions(self) -> int:
        return len(self.correct)

    @property
    def samples(self) -> int:
        return len(self.correct[0])

    def per_question(self) -> dict[str, NDArray[np.float64] | None]:
        """Statistic -> [P] its value for each question, or None if it was not measured."""
        greedy = self.greedy_correct
        # With one sample of each question, pass@k would repeat Pass@1.
        pass_k = {f"pass@{self.samples}": pass_at_k(self.correct, self.samples)} if self.samples > 1 else {}
        if self.votes is not None and self.samples > 1:
            pass_k[f"maj@{self.samples}"] = maj_at_k(self.correct, self.votes)
        return {
            "pass@1": avg_at_k(self.correct),
            "greedy": None if greedy is None else greedy.astype(np.float64),
            **pass_k,
            "length": self.lengths.mean(axis=1),
            "truncated": self.truncated.mean(axis=1),
        }

    def estimates(self) -> dict[str, Estimate | None]:
        """Statistic -> its mean over questions with its bootstrap 95% interval, or None if it was not measured."""
        return {name: None if v is None else bootstrap(v) for name, v in self.per_question().items()}

    def metrics(self) -> dict[str, float]:
        """The statistics' means under their names in metrics.jsonl: eval/<set>/pass@1, ..."""
        return {f"eval/{self.name}/{k}": float(v.mean()) for k, v in self.per_question().items() if v is not None}

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object, verdicts as 0 and 1, with a `summary` of the estimates for human readers."""
        summary = {name: None if e is None else [e.value, e.low, e.high] for name, e in self.estimates().items()}
        return {
            "name": self.name,
            "step": self.step,
            "problems": self.questions,
            "samples": self.samples,
            "summary": summary,
            "identity": self.identity,
            "greedy_correct": None if self.greedy_correct is None else self.greedy_correct.astype(int).tolist(),
            "correct": self.correct.astype(int).tolist(),
            "truncated": self.truncated.astype(int).tolist(),
            "lengths": self.lengths.tolist(),
            "votes": None if self.votes is None else self.votes.tolist(),
        }


def file_stem(name: str) -> str:
    """The set's name with only the characters that its file names may have."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)


def evaluation_file(directory: Path, name: str, step: int) -> Path:
    """Path of the result of a set at a training step."""
    return directory / f"{file_stem(name)}.step_{step}.json"


def write_evaluation(directory: Path, result: EvaluationResult) -> Path:
    """Write directory/<set>.step_<N>.json atomically, replacing an earlier one, and return its path."""
    path = evaluation_file(directory, result.name, result.step)
    write_atomically(path, json.dumps(result.to_json()) + "\n")
    return path


def read_evaluation(path: Path) -> EvaluationResult:
    """The result in a file. Raises FileError (a UserError) if it is not an evaluation."""
    saved: Any = read_json(path, _SavedResult)
    try:
        return EvaluationResult(**{f.name: saved[f.name] for f in fields(EvaluationResult) if f.name in saved})
    except ValueError as error:  # matrices of different shapes
        raise FileError(path, f"not an evaluation result: {error}") from None


def read_evaluations(directory: Path, note: Callable[[str], Any] = log.warning) -> list[EvaluationResult]:
    """Results in a run's evaluation directory, sorted by set and step.

    note: called with a message for each damaged file, which is left out.
    """
    results = []
    for path in sorted(directory.glob("*.json")):
        try:
            results.append(read_evaluation(path))
        except FileError as fault:
            note(f"left out: {fault}")
    return sorted(results, key=lambda r: (r.name, r.step))
