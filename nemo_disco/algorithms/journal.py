"""The record of a run: metrics, saved rollouts, evaluations, progress. Rank 0 writes and prints; the others do nothing.

Writes values that the trainer gives it; decides nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from nemo_disco.algorithms.token_values import ResponseValues, TokenValues
from nemo_disco.config.schema import ExpManagerConfig
from nemo_disco.data.chat import token_widths
from nemo_disco.evaluation.result import EvaluationResult, write_evaluation
from nemo_disco.evaluation.saved_tokens import pack_values, pack_widths
from nemo_disco.rollout.collector import RolloutBatch
from nemo_disco.runtime.files import write_atomically
from nemo_disco.runtime.progress import Progress
from nemo_disco.runtime.rundir import RunDirectory
from nemo_disco.runtime.saved_files import read_json_lines
from nemo_disco.runtime.sinks import MetricsLine, Sinks, open_sinks

log = logging.getLogger(__name__)


class Journal:
    """Writes the run directory, and the progress on the screen."""

    def __init__(
        self,
        run: RunDirectory,
        config: ExpManagerConfig,
        *,
        writes: bool,
        delta: float | None,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """writes: True on rank 0. delta: the constraint's, which the progress compares KL with. settings: the whole
        configuration, for the services that show it."""
        self.run, self.config, self.writes, self.delta, self.settings = run, config, writes, delta, settings
        self._sinks: Sinks | None = None
        self._progress: Progress | None = None

    @contextmanager
    def watch(self, max_steps: int, start_step: int) -> Iterator[None]:
        """Open the sinks and the progress. Lines of metrics.jsonl beyond start_step, of a process that was killed, are
        dropped."""
        if not self.writes:
            yield
            return
        also = [name for name in ("tensorboard", "wandb", "mlflow") if getattr(self.config, name)]
        with (
            open_sinks(self.run, start_step or None, also, self.settings) as self._sinks,
            Progress(max_steps, start_step, self.delta) as self._progress,
        ):
            yield
        self._sinks = self._progress = None

    def write_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of a step to every sink, and show them."""
        if self._sinks is not None and self._progress is not None:
            self.run.check_held()
            self._sinks.write(step, metrics)
            self._progress.update({"step": step, **metrics})

    def has(self, step: int) -> bool:
        """True if metrics.jsonl has the line of a step. Called on rank 0."""
        path = self.run.metrics
        lines = read_json_lines(path, MetricsLine) if path.exists() else ()
        return any(not line.fault and line.value["step"] == step for line in lines)

    def log(self, text: str) -> None:
        """Print one line for the person."""
        if self._progress is not None:
            self._progress.message(text)
        elif self.writes:
            log.info(text)

    def evaluated(self, results: Sequence[EvaluationResult]) -> None:
        """Write the results of an evaluation, and log their Pass@1."""
        for result in results if self.writes else ():
            self.run.check_held()
            write_evaluation(self.run.evaluation, result)
            pass_at_1 = result.per_problem()["pass@1"]
            assert pass_at_1 is not None
            self.log(
                f"step {result.step}: {result.name}: Pass@1 (avg@{result.samples}) {pass_at_1.mean():.3f} "
                f"on {result.problems} problems"
            )

    def saved_rows(self, responses: int) -> range:
        """The indices of a step's responses that are saved: the last ones, since the first mini-batch sees no ratio."""
        return range(max(0, responses - self.config.saved_rollouts) if self.writes else responses, responses)

    def write_rollouts(self, step: int, batch: RolloutBatch, values: TokenValues | None = None) -> None:
        """Save responses of a step, to read: one JSON object a line. values: of their tokens, once trained on."""
        if not (rows := self.saved_rows(len(batch.texts))):
            return
        known = values.by_response if values else {}
        lines = [_line(batch, i) | (_token_fields(batch, i, known[i]) if i in known else {}) for i in rows]
        self.run.check_held()
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
    ended = [] if batch.rollouts.truncated[i] else [0]  # the token that ended it is not in the text
    widths = token_widths(batch.prompts.tokenizer, tokens[: len(tokens) - len(ended)], text)
    if not tokens or widths is None:
        return {}
    return {
        "token_widths": pack_widths(widths + ended),
        "weight": pack_values(values.weights),
        "log_ratio": pack_values(values.log_ratios),
    }
