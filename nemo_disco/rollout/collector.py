"""One step's rollouts: asked, sampled, rewarded and, under dynamic sampling, asked again until the groups are mixed.

Asked for a step ahead, where the engine samples while the policy trains. Touches the engine, the grader and the sampler
through their contracts; no policy. The same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import numpy as np

from nemo_disco.config.schema import RunConfig
from nemo_disco.data.question_order import QuestionOrder
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.generation.engine import Engine, EngineApart, Outstanding, Response, SamplingParams
from nemo_disco.rewards import Rewards
from nemo_disco.rewards.registry import Grader
from nemo_disco.rollout.grading import EarlyGrades, grade
from nemo_disco.rollout.history import ShortestCorrect
from nemo_disco.rollout.prompts import PromptSet
from nemo_disco.rollout.requests import packed
from nemo_disco.rollout.rewarding import reward
from nemo_disco.runtime.clock import Clock
from nemo_disco.runtime.signals import StoppedError


@dataclass(frozen=True)
class RolloutBatch:
    """Rewarded rollouts with their questions and texts, one of each a response. counts: dynamic sampling's metrics."""

    rollouts: Rollouts
    picked: PromptSet
    texts: list[str]
    counts: Mapping[str, float] = field(default_factory=dict)

    def groups(self) -> dict[int, bool]:
        """Which questions have right and wrong responses, in the order asked."""
        verdicts: dict[int, set[bool]] = {}
        for question, right in zip(self.rollouts.question_ids.tolist(), self.rollouts.correct.tolist(), strict=True):
            verdicts.setdefault(question, set()).add(right)
        return {question: len(found) == 2 for question, found in verdicts.items()}

    def select(self, questions: set[int]) -> RolloutBatch:
        """The responses to some of the questions."""
        rows = [i for i, question in enumerate(self.rollouts.question_ids.tolist()) if question in questions]
        return RolloutBatch(self.rollouts.select(rows), self.picked.select(rows), [self.texts[i] for i in rows])

    @staticmethod
    def join(parts: Sequence[RolloutBatch]) -> RolloutBatch:
        first = parts[0].picked
        picked = PromptSet(
            first.name,
            [q for part in parts for q in part.picked.questions],
            [p for part in parts for p in part.picked.prompts],
            first.tokenizer,
        )
        rollouts = Rollouts.concatenate([part.rollouts for part in parts])
        return RolloutBatch(rollouts, picked, [text for part in parts for text in part.texts])


@dataclass(frozen=True)
class _Request:
    """What the engine is asked for at once, and what grades it as it comes."""

    picked: PromptSet
    seeds: list[int]
    sampling: SamplingParams
    early: EarlyGrades


@dataclass(frozen=True)
class _Ahead:
    """The next step's questions, asked before its turn; `sampled` once received. state: the collector's before that."""

    indices: list[int]
    state: dict[str, Any]
    request: _Request
    outstanding: Outstanding
    sampled: RolloutBatch | None = None


class Collector:
    """Collects each step's rollouts; what it must remember between steps is in its state."""

    def __init__(
        self,
        config: RunConfig,
        *,
        engine: Engine,
        grader: Grader,
        prompts: PromptSet,
        order: QuestionOrder,
        say: Callable[[str], None],
        remembers: bool = False,
    ) -> None:
        """say: where a line for the person goes. remembers: keep the shortest right answer to each question."""
        self.config, self.engine, self.grader = config, engine, grader
        self.prompts, self.order, self.say = prompts, order, say
        self.rewards = Rewards(config.reward, config.algorithm.preference)
        self.history = ShortestCorrect() if remembers else None
        self._ahead: _Ahead | None = None

    def ask(self, step: int) -> None:
        """Let an engine in processes of its own begin with the rollouts of the step after `step` steps, from the
        weights that it has. `receive` must follow before anything else is asked of it, then `collect` for that step.

        Until then the state stays what it was: a run that is resumed in between asks the same questions again.
        """
        state, indices = self.state_dict(), self.order.next()
        request = self._request(indices, step, 0)
        engine = cast(EngineApart, self.engine)
        outstanding = engine.ask(request.picked.prompts, request.seeds, request.sampling, request.early.finished)
        self._ahead = _Ahead(indices, state, request, outstanding)

    def receive(self, version: int, clock: Clock) -> None:
        """Wait for what was asked ahead, if anything was. version: of the weights that the policy has now. Where a
        user's function takes too long after a request to stop, it is as if nothing had been asked."""
        if self._ahead is None:
            return
        with clock("generate"):
            responses = self._ahead.outstanding(version)
        before = self._ahead.state
        try:
            self._ahead = replace(self._ahead, sampled=self._rewarded(self._ahead.request, responses, clock))
        except StoppedError:
            self._ahead = None
            self.load_state_dict(before)

    def collect(self, step: int, clock: Clock) -> RolloutBatch:
        """The rollouts of the step after `step` steps: G responses to each of data.questions_per_step questions.

        Raises StoppedError where a user's function takes too long after a request to stop; then the state is what it
        was before.
        """
        before = self.state_dict()
        try:
            return self._collect(step, clock)
        except StoppedError:
            self.load_state_dict(before)
            raise

    def _collect(self, step: int, clock: Clock) -> RolloutBatch:
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            asked = self.order.next()
            parts = [self._sample(asked, step, 0, clock)]
        else:
            assert ahead.sampled is not None, "the rollouts that were asked ahead have not been received"
            with clock("generate"), clock("grade"):  # which every step has
                asked, parts = ahead.indices, [ahead.sampled]
        wanted, rounds = len(asked), self.config.algorithm.dynamic_sampling_rounds
        for again in range(1, rounds + 1):
            if sum(mixed for part in parts for mixed in part.groups().values()) >= wanted:
                break
            # The sampler hands out no question twice in a step of its own, but may in the next one.
            more = [i for i in self.order.next() if i not in asked]
            if more:
                asked = asked + more
                parts.append(self._sample(more, step, again, clock))
        if not rounds:
            return parts[0]
        kept, said = keep_mixed(RolloutBatch.join(parts), wanted)
        if said:
            self.say(f"step {step + 1}: dynamic sampling: {said}")
        return kept

    def _request(self, indices: Sequence[int], step: int, again: int) -> _Request:
        generation = self.config.generation
        limit = generation.response_limit(step)
        sampling = SamplingParams(generation.temperature, limit, generation.top_p, generation.top_k)
        picked = self.prompts.select(indices, generation.responses_per_question)
        seeds = np.random.SeedSequence((self.config.seed, step), spawn_key=(again,) if again else ())
        draws = [int(s) for s in seeds.generate_state(len(picked), np.uint64) >> 1]
        return _Request(picked, draws, sampling, EarlyGrades(self.grader, picked))

    def _sample(self, indices: Sequence[int], step: int, again: int, clock: Clock) -> RolloutBatch:
        request = self._request(indices, step, again)
        with clock("generate"):
            responses = self.engine.generate(
                request.picked.prompts, request.seeds, request.sampling, request.early.finished
            )
        return self._rewarded(request, responses, clock)

    def _rewarded(self, request: _Request, responses: Sequence[Response], clock: Clock) -> RolloutBatch:
        picked = request.picked
        with clock("generate"):
            rollouts, texts = packed(picked, responses)
        with clock("grade"):
            verdicts = request.early.collect(texts, partial(grade, self.grader))
            rollouts = reward(
                rollouts,
                texts,
                picked,
                verdicts=verdicts,
                rewards=self.rewards,
                threshold=self.config.algorithm.threshold,
                max_response_length=request.sampling.max_response_length,
            )
        return RolloutBatch(self.history.told(rollouts) if self.history else rollouts, picked, texts)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        if self._ahead is not None:
            return self._ahead.state
        history = {} if self.history is None else {"shortest_correct": self.history.state_dict()}
        return {"sampler": self.order.state_dict(), **history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises UserError if the questions are others than those of the state, unless data.if_changed says restart:
        then they begin anew, and nothing is remembered of the old ones."""
        changed = self.order.changes(state["sampler"])
        if changed and self.config.data.if_changed == "restart":
            self.say(f"data.if_changed=restart: the new questions begin, where there were {'; '.join(changed)}")
            return
        self.order.load_state_dict(state["sampler"])
        if self.history is not None:
            self.history.load_state_dict(state.get("shortest_correct", {}))


def keep_mixed(sampled: RolloutBatch, wanted: int) -> tuple[RolloutBatch, str]:
    """The first `wanted` groups that are mixed; where there are fewer, others fill the step, so that its size stays.

    And what to say of those that are dropped or fill, or "" (DAPO's dynamic sampling, arXiv 2503.14476).
    """
    groups = sampled.groups()
    order = [q for q, mixed in groups.items() if mixed] + [q for q, mixed in groups.items() if not mixed]
    kept, dropped = order[:wanted], order[wanted:]
    filled = sum(not groups[q] for q in kept)
    surplus = sum(groups[q] for q in dropped)
    said = [f"{len(dropped) - surplus} of {len(groups)} groups dropped as all right or all wrong"] if dropped else []
    said += [f"{surplus} mixed ones dropped beyond the {wanted} of the step"] if surplus else []
    said += [f"only {wanted - filled} are mixed: {filled} others stay"] if filled else []
    counts = {"groups/sampled": len(groups), "groups/dropped": len(dropped)}
    return replace(sampled.select(set(kept)), counts=counts), "; ".join(said)
