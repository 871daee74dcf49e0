"""The record of a run: metrics, saved rollouts, evaluations, progress. Rank 0 writes and prints; the others do nothing.

Writes values that the trainer gives it; decides nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nemo_disco.algorithms.step import MiniBatchResult
from nemo_disco.config.schema import ExpManagerConfig
from nemo_disco.data.chat import token_widths
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.evaluation.result import EvaluationResult, write_evaluation
from nemo_disco.evaluation.saved_tokens import pack_values, pack_widths
from nemo_disco.rollout.collector import RolloutBatch
from nemo_disco.runtime.files import write_atomically
from nemo_disco.runtime.progress import Progress
from nemo_disco.runtime.rundir import RunDirectory
from nemo_disco.runtime.saved_files import read_json_lines
from nemo_disco.runtime.sinks import MetricsLine, Sink, open_sinks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResponseValues:
    """Values of one response's tokens, one each.

    weights: - T d loss / d log-prob, T the mini-batch's tokens: above 0 a token becomes likelier, and the size does not
    depend on T. log_ratios: log policy - log old policy, as the objective saw it (0 in a step's first mini-batch).
    """

    weights: NDArray[np.float64]
    log_ratios: NDArray[np.float64]


@dataclass
class TokenValues:
    """Values of the tokens of the responses that are saved to read, which the trainer adds mini-batch by mini-batch.

    rows: the step's responses to save. by_response: values of those that were in an applied mini-batch.
    """

    rows: Container[int]
    by_response: dict[int, ResponseValues] = field(default_factory=dict)

    def add(self, responses: Tensor, rollouts: Rollouts, result: MiniBatchResult, old_log_probs: Tensor) -> None:
        """Add the values of a mini-batch.

        responses: indices in the step of the mini-batch's responses; rollouts, old_log_probs [T]: of the mini-batch.
        """
        matches = [(place, row) for place, row in enumerate(responses.tolist()) if row in self.rows]
        if not matches:
            return
        weights = (-len(result.token_weights) * result.token_weights).cpu().numpy()
        log_ratios = (result.log_probs.double() - old_log_probs.double()).cpu().numpy()
        offsets = rollouts.response_offsets.tolist()
        for place, row in matches:
            tokens = slice(offsets[place], offsets[place + 1])
            self.by_response[row] = ResponseValues(weights[tokens], log_ratios[tokens])


@dataclass(eq=False)
class Journal:
    """Writes the run directory, and the progress on the screen.

    writes: True on rank 0. delta: the constraint's, which the progress compares KL with. settings: the whole
    configuration, for the services that show it.
    """

    run: RunDirectory
    config: ExpManagerConfig
    writes: bool
    delta: float | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    _sinks: Sequence[Sink] = ()
    _progress: Progress | None = None

    @contextmanager
    def open(self, max_steps: int, start_step: int) -> Iterator[None]:
        """Open the sinks and the progress. Lines of metrics.jsonl beyond start_step, of a process that was killed, are
        dropped."""
        if not self.writes:
            yield
            return
        services = [name for name in ("tensorboard", "wandb", "mlflow") if getattr(self.config, name)]
        with (
            open_sinks(self.run, start_step or None, services, self.settings) as self._sinks,
            Progress(max_steps, start_step, self.delta) as self._progress,
        ):
            yield
        self._sinks, self._progress = (), None

    def write_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of a step to every sink, and show them."""
        if self._progress is not None:
            self.run.check_lock()
            for sink in self._sinks:
                sink.write(step, metrics)
            self._progress.update({"step": step, **metrics})

    def has_step(self, step: int) -> bool:
        """True if metrics.jsonl has the line of a step. Called on rank 0."""
        path = self.run.metrics
        lines = read_json_lines(path, MetricsLine) if path.exists() else ()
        return any(not line.fault and line.value["step"] == step for line in lines)

    def log(self, text: str) -> None:
        """Print one line for the user."""
        if self._progress is not None:
            self._progress.print_line(text)
        elif self.writes:
            log.info(text)

    def write_evaluation(self, result: EvaluationResult) -> None:
        """Write the result of an evaluation, and log its Pass@1."""
        if not self.writes:
            return
        self.run.check_lock()
        write_evaluation(self.run.evaluation, result)
        pass_at_1 = result.per_question()["pass@1"]
        assert pass_at_1 is not None
        self.log(
            f"step {result.step}: {result.name}: Pass@1 (avg@{result.samples}) {pass_at_1.mean():.3f} "
            f"on {result.questions} questions"
        )

    def saved_rows(self, responses: int) -> range:
        """The indices of a step's responses that are saved: the last, as log_ratios are 0 in the first mini-batch."""
        return range(max(0, responses - self.config.saved_rollouts) if self.writes else responses, responses)

    def write_rollouts(self, step: int, batch: RolloutBatch, values: TokenValues | None = None) -> None:
        """Save responses of a step for people, one JSON object a line. values: of the tokens that were trained on."""
        if not (rows := self.saved_rows(len(batch.texts))):
            return
        by_row = values.by_response if values else {}
        lines = [_line(batch, i) | (_token_fields(batch, i, by_row[i]) if i in by_row else {}) for i in rows]
        self.run.check_lock()
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomically(self.run.rollout_file(step), text)


def _line(batch: RolloutBatch, i: int) -> dict[str, Any]:
    question, rollouts = batch.prompts.questions[i], batch.rollouts
    return {
        "question_id": question.id,
        "question": question.user_text,
        "prompt": batch.prompts.tokenizer.decode(batch.prompts.prompts[i]),
        "response": batch.texts[i],
        "answer": list(question.answers),
        "reward": float(rollouts.rewards[i]),
        "correct": bool(rollouts.correct[i]),
        "length": int(rollouts.response_lengths[i]),
        "truncated": bool(rollouts.truncated[i]),
    }


def _token_fields(batch: RolloutBatch, i: int, values: ResponseValues) -> dict[str, Any]:
    """The values of response i's tokens; {} if the tokens decoded one by one do not add up to its text."""
    tokens, text = batch.rollouts.response(i).tolist(), batch.texts[i]
    end = [] if batch.rollouts.truncated[i] else [0]  # the stop token is not in the text
    widths = token_widths(batch.prompts.tokenizer, tokens[: len(tokens) - len(end)], text)
    if not tokens or widths is None:
        return {}
    return {
        "token_widths": pack_widths(widths + end),
        "weight": pack_values(values.weights),
        "log_ratio": pack_values(values.log_ratios),
    }
