"""The rollouts of a step: requested, sampled, rewarded and, under dynamic sampling, requested again until the groups
are mixed. Requested a step ahead where the engine samples while the policy trains.

Touches the engine, the grader and the question order through their contracts; no policy. The same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np

from nemo_disco.config.schema import GenerationConfig
from nemo_disco.data.question_order import QuestionOrder
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.generation.engine import AsynchronousEngine, Engine, PendingResponses, Response, SamplingParams
from nemo_disco.rewards import Rewards
from nemo_disco.rewards.grader import Grader
from nemo_disco.rollout.grading import EarlyGrading
from nemo_disco.rollout.prompts import PromptSet
from nemo_disco.rollout.responses import ResponseTexts, pack_responses
from nemo_disco.rollout.rewarding import Signal, compute_column, reward_rollouts
from nemo_disco.runtime.spans import span
from nemo_disco.runtime.stop_signals import StoppedError


@dataclass(frozen=True)
class RolloutBatch:
    """Rewarded rollouts with the prompt and the text of each response. counts: dynamic sampling's metrics."""

    rollouts: Rollouts
    prompts: PromptSet
    texts: ResponseTexts
    counts: Mapping[str, float] = field(default_factory=dict)

    def mixed_groups(self) -> dict[int, bool]:
        """For each question id, in the order of the prompts: True if it has right and wrong responses."""
        verdicts: dict[int, set[bool]] = {}
        for question, correct in zip(self.rollouts.question_ids.tolist(), self.rollouts.correct.tolist(), strict=True):
            verdicts.setdefault(question, set()).add(correct)
        return {question: len(values) == 2 for question, values in verdicts.items()}

    def select(self, question_ids: set[int]) -> RolloutBatch:
        """The responses to some of the questions."""
        rows = [i for i, question in enumerate(self.rollouts.question_ids.tolist()) if question in question_ids]
        return RolloutBatch(self.rollouts.select(rows), self.prompts.select(rows), self.texts.select(rows))

    @staticmethod
    def join(parts: Sequence[RolloutBatch]) -> RolloutBatch:
        return RolloutBatch(
            Rollouts.concatenate([part.rollouts for part in parts]),
            PromptSet.join([part.prompts for part in parts]),
            ResponseTexts.join([part.texts for part in parts]),
        )


@dataclass(frozen=True)
class _Request:
    prompts: PromptSet
    seeds: list[int]
    sampling: SamplingParams
    grading: EarlyGrading


@dataclass(frozen=True)
class _Ahead:
    """The next step's request, made while the policy trains. state: the collector's before it; `receive` sets batch."""

    indices: list[int]
    state: dict[str, Any]
    request: _Request
    pending: PendingResponses
    batch: RolloutBatch | None = None


@dataclass(eq=False)
class Collector:
    """Collects each step's rollouts. Its memory (the order of the questions, signals) is its state.

    log: prints a line for the user. dynamic_sampling_rounds: at most so many further requests a step.
    restart_if_changed: begin the questions anew if a checkpoint has other ones (data.if_changed=restart).
    routes: ask the engine for the experts of each token too (model.moe_router_replay=engine).
    """

    generation: GenerationConfig
    engine: Engine
    grader: Grader
    rewards: Rewards
    prompts: PromptSet
    order: QuestionOrder
    seed: int
    threshold: float
    log: Callable[[str], None]
    signals: Sequence[Signal] = ()
    dynamic_sampling_rounds: int = 0
    restart_if_changed: bool = False
    routes: bool = False
    _ahead: _Ahead | None = None

    def request_ahead(self, step: int) -> None:
        """Let an engine in processes of its own begin with the rollouts of the step after `step` steps, from the
        weights that it has. `receive` must follow before the engine gets another request, then `collect` for that step.

        Until then the state stays as it was: a run that is resumed in between requests the same questions again.
        """
        state, indices = self.state_dict(), self.order.next()
        request = self._request(indices, step, 0)
        engine = cast(AsynchronousEngine, self.engine)
        prompts, finished = request.prompts.prompts, request.grading.finished
        pending = engine.start_generating(prompts, request.seeds, request.sampling, finished)
        self._ahead = _Ahead(indices, state, request, pending)

    def receive(self, version: int) -> None:
        """Wait for the responses to `request_ahead`, if it was called, and reward them. version: the policy's now.
        Where a user's function takes too long after a request to stop, the request is undone."""
        if self._ahead is None:
            return
        with span("generate"):
            responses = self._ahead.pending(version)
        state = self._ahead.state
        try:
            self._ahead = replace(self._ahead, batch=self._reward(self._ahead.request, responses))
        except StoppedError:
            self._ahead = None
            self.load_state_dict(state)

    def collect(self, step: int) -> RolloutBatch:
        """The rollouts of the step after `step` steps: G responses to each of data.questions_per_step questions.

        Raises StoppedError where a user's function takes too long after a request to stop; then the state is as before.
        """
        state = self.state_dict()
        try:
            return self._collect(step)
        except StoppedError:
            self.load_state_dict(state)
            raise

    def _collect(self, step: int) -> RolloutBatch:
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            indices = self.order.next()
            batches = [self._sample(indices, step, 0)]
        else:
            assert ahead.batch is not None, "receive must be called between request_ahead and collect"
            with span("generate"), span("grade"):  # every step has both
                indices, batches = ahead.indices, [ahead.batch]
        n_groups = len(indices)
        for sampling_round in range(1, self.dynamic_sampling_rounds + 1):
            if sum(mixed for batch in batches for mixed in batch.mixed_groups().values()) >= n_groups:
                break
            # The order gives no question twice in a step of its own, but may give one again in the next.
            more = [i for i in self.order.next() if i not in indices]
            if more:
                indices = indices + more
                batches.append(self._sample(more, step, sampling_round))
        if not self.dynamic_sampling_rounds:
            return batches[0]
        batch, note = keep_mixed(RolloutBatch.join(batches), n_groups)
        if note:
            self.log(f"step {step + 1}: dynamic sampling: {note}")
        return batch

    def _request(self, indices: Sequence[int], step: int, sampling_round: int) -> _Request:
        g = self.generation
        prompts = self.prompts.select(indices, copies=g.responses_per_question)
        sequence = np.random.SeedSequence((self.seed, step), spawn_key=(sampling_round,) if sampling_round else ())
        seeds = [int(s) for s in sequence.generate_state(len(prompts), np.uint64) >> 1]
        sampling = SamplingParams(g.temperature, g.response_limit(step), g.top_p, g.top_k, self.routes)
        return _Request(prompts, seeds, sampling, EarlyGrading(self.grader, prompts))

    def _sample(self, indices: Sequence[int], step: int, sampling_round: int) -> RolloutBatch:
        request = self._request(indices, step, sampling_round)
        with span("generate"):
            responses = self.engine.generate(
                request.prompts.prompts, request.seeds, request.sampling, request.grading.finished
            )
        return self._reward(request, responses)

    def _reward(self, request: _Request, responses: Sequence[Response]) -> RolloutBatch:
        texts = request.grading.texts
        rollouts = pack_responses(request.prompts, responses, request.sampling.max_response_length)
        with span("grade"):
            grades = request.grading.collect(responses)
            rollouts = reward_rollouts(rollouts, texts, request.prompts, grades, self.rewards, self.threshold)
        rollouts = rollouts.with_columns({signal.name: compute_column(signal, rollouts) for signal in self.signals})
        return RolloutBatch(rollouts, request.prompts, texts)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        if self._ahead is not None:
            return self._ahead.state
        return {"sampler": self.order.state_dict()} | {s.name: s.state_dict() for s in self.signals if s.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises UserError if the questions are others than those of the state, unless restart_if_changed: then they
        begin anew, and the signals forget the old ones."""
        changes = self.order.changes(state["sampler"])
        if changes and self.restart_if_changed:
            self.log(f"data.if_changed=restart: the new questions begin, where there were {'; '.join(changes)}")
            return
        self.order.load_state_dict(state["sampler"])
        for signal in self.signals:
            signal.load_state_dict(state.get(signal.name, {}))

    def close(self) -> None:
        """End the processes of the user's reward functions."""
        self.rewards.close()


def keep_mixed(batch: RolloutBatch, n_groups: int) -> tuple[RolloutBatch, str]:
    """The first n_groups groups that are mixed; where there are fewer, others fill the step, so that its size stays.

    Also a line about the groups that are dropped or fill, or "" (DAPO's dynamic sampling, arXiv 2503.14476).
    """
    groups = batch.mixed_groups()
    order = [q for q, mixed in groups.items() if mixed] + [q for q, mixed in groups.items() if not mixed]
    kept, dropped = order[:n_groups], order[n_groups:]
    filled = sum(not groups[q] for q in kept)
    surplus = sum(groups[q] for q in dropped)
    notes = [f"{len(dropped) - surplus} of {len(groups)} groups dropped as all right or all wrong"] if dropped else []
    notes += [f"{surplus} mixed ones dropped beyond the {n_groups} of the step"] if surplus else []
    notes += [f"only {n_groups - filled} are mixed: {filled} others stay"] if filled else []
    counts = {"groups/sampled": len(groups), "groups/dropped": len(dropped)}
    return replace(batch.select(set(kept)), counts=counts), "; ".join(notes)
