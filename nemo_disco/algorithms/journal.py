"""What a run writes and shows: metrics, saved rollouts, evaluations, progress. Rank 0's; silent on the others.

Reads what the loop hands it; decides nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from nemo_disco.algorithms.token_values import OfTokens, TokenValues
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
    """The run directory's writer, and the person's display."""

    def __init__(
        self,
        run: RunDirectory,
        config: ExpManagerConfig,
        *,
        writes: bool,
        delta: float | None,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """writes: whether this is rank 0. delta: what the display compares KL with. settings: the whole configuration,
        for the services that show it."""
        self.run, self.config, self.writes, self.delta, self.settings = run, config, writes, delta, settings
        self._sinks: Sinks | None = None
        self._progress: Progress | None = None

    @contextmanager
    def watch(self, max_steps: int, start_step: int) -> Iterator[None]:
        """Open the sinks (a history beyond start_step, of a life that was lost, is dropped) and the display."""
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

    def stepped(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self._sinks is not None and self._progress is not None:
            self.run.check_held()
            self._sinks.write(step, metrics)
            self._progress.update({"step": step, **metrics})

    def has(self, step: int) -> bool:
        """Whether metrics.jsonl has the line of a step. For rank 0."""
        path = self.run.metrics
        lines = read_json_lines(path, MetricsLine) if path.exists() else ()
        return any(not line.fault and line.value["step"] == step for line in lines)

    def say(self, text: str) -> None:
        """One line for the person."""
        if self._progress is not None:
            self._progress.message(text)
        elif self.writes:
            log.info(text)

    def evaluated(self, results: Sequence[EvaluationResult]) -> None:
        for result in results if self.writes else ():
            self.run.check_held()
            write_evaluation(self.run.evaluation, result)
            found = result.per_problem()["pass@1"]
            assert found is not None
            self.say(
                f"step {result.step}: {result.name}: Pass@1 (avg@{result.samples}) {found.mean():.3f} "
                f"on {result.problems} problems"
            )

    def saved(self, responses: int) -> range:
        """Which of a step's responses are saved to read: the last, since a step's first mini-batch sees no ratio."""
        return range(max(0, responses - self.config.saved_rollouts) if self.writes else responses, responses)

    def rollouts(self, step: int, sampled: RolloutBatch, values: TokenValues | None = None) -> None:
        """Save responses of a step, to read: one JSON object a line. values: what training said of their tokens."""
        if not (rows := self.saved(len(sampled.texts))):
            return
        found = values.found if values else {}
        lines = [_line(sampled, i) | (_of_tokens(sampled, i, found[i]) if i in found else {}) for i in rows]
        self.run.check_held()
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomically(self.run.rollout_file(step), text)


def _line(sampled: RolloutBatch, i: int) -> dict[str, Any]:
    question, rollouts = sampled.picked.questions[i], sampled.rollouts
    return {
        "question_id": question.id,
        "question": question.user_text,
        "prompt": sampled.picked.tokenizer.decode(sampled.picked.prompts[i]),
        "response": sampled.texts[i],
        "answer": list(question.answers),
        "reward": float(rollouts.rewards[i]),
        "correct": bool(rollouts.correct[i]),
        "length": int(rollouts.response_lengths[i]),
        "truncated": bool(rollouts.truncated[i]),
    }


def _of_tokens(sampled: RolloutBatch, i: int, values: OfTokens) -> dict[str, Any]:
    """Nothing where the response's text is not what its tokens make one by one."""
    tokens, text = sampled.rollouts.response(i).tolist(), sampled.texts[i]
    ended = [] if sampled.rollouts.truncated[i] else [0]  # the token that ended it is not in the text
    widths = token_widths(sampled.picked.tokenizer, tokens[: len(tokens) - len(ended)], text)
    if not tokens or widths is None:
        return {}
    return {
        "token_widths": pack_widths(widths + ended),
        "weight": pack_values(values.weights),
        "log_ratio": pack_values(values.log_ratios),
    }
