"""Collecting a step's rollouts: dynamic sampling and its bound, limits that rise, HAPO's memory, mismatch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import model_config

from nemo_disco.algorithms.mismatch import mismatch
from nemo_disco.algorithms.objectives.length import ShortestCorrect
from nemo_disco.config.compose import compose
from nemo_disco.data.question_order import QuestionOrder
from nemo_disco.data.questions import Question
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.generation.engine import Finished, PendingResponses, Response, SamplingParams
from nemo_disco.policy import parallel
from nemo_disco.rewards import Rewards
from nemo_disco.rollout.collector import Collector
from nemo_disco.rollout.prompts import PromptSet
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.signals import StoppedError


class Tokenizer:
    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return " ".join(map(str, tokens))


class Scripted:
    """An engine whose responses to a prompt [q] are q and the response's number among those to q, padded to its length;
    and a grader for them."""

    def __init__(self, right: dict[int, int], lengths: dict[int, int]) -> None:
        """right: how many of its responses are right, by question; lengths in tokens, else 3."""
        self.right, self.lengths, self.limits, self.version = right, lengths, [], 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingParams,
        finished: Finished,  # noqa: ARG002
    ) -> list[Response]:
        assert len(set(seeds)) == len(seeds)
        self.limits.append(sampling.max_response_length)
        seen: dict[int, int] = {}
        responses = []
        for (question,) in prompts:
            seen[question] = seen.get(question, -1) + 1
            tokens = [question, seen[question]] + [0] * (self.lengths.get(question, 3) - 2)
            responses.append(Response(np.array(tokens), -np.ones(len(tokens), np.float32), "length", self.version))
        return responses

    def start_generating(self, *request: Any) -> PendingResponses:
        responses = self.generate(*request)
        return lambda _: responses

    def grade(self, texts: Sequence[str], answers: Sequence[Any]) -> list[float]:  # noqa: ARG002
        numbers = [list(map(int, text.split()[:2])) for text in texts]
        return [float(number < self.right.get(question, 0)) for question, number in numbers]


@pytest.fixture
def collector(tmp_path: Path) -> Any:
    parallel.start(model_config(tmp_path))
    said: list[str] = []

    def make(right: dict[int, int], *overrides: str, lengths: dict[int, int] | None = None, **more: Any) -> Any:
        n = 8
        group = "generation.responses_per_question=2"
        step = ("data.questions_per_step=2", "algorithm.mini_batch_questions=2", "data.shuffle=false")
        config = compose("quickstart", [group, *step, *overrides])
        script = Scripted(right, lengths or {})
        made = Collector(
            config.generation,
            engine=script,  # type: ignore[arg-type]
            grader=script,  # type: ignore[arg-type]
            prompts=PromptSet(
                "q", [Question(i, f"{i}?", ("",), "") for i in range(n)], [[i] for i in range(n)], Tokenizer()
            ),
            order=QuestionOrder(n, 2, 1, False),
            log=said.append,
            rewards=Rewards(config.reward),
            seed=config.seed,
            threshold=config.algorithm.threshold,
            dynamic_sampling_rounds=config.algorithm.dynamic_sampling_rounds,
            restart_if_changed=config.data.if_changed == "restart",
            **more,
        )
        return made, script, said

    return make


def asked(rollouts: Rollouts) -> list[int]:
    return list(dict.fromkeys(rollouts.question_ids.tolist()))


DYNAMIC = "algorithm.dynamic_sampling_rounds=2"


def test_questions_are_asked_until_enough_groups_are_mixed(collector: Any) -> None:
    made, _, said = collector({0: 2, 1: 1, 2: 0, 3: 1}, DYNAMIC)
    sampled = made.collect(0)
    assert asked(sampled.rollouts) == [1, 3]
    assert [q.id for q in sampled.prompts.questions] == [1, 1, 3, 3]
    assert list(sampled.texts) == ["1 0 0", "1 1 0", "3 0 0", "3 1 0"]
    assert sampled.rollouts.rewards.tolist() == [1, 0, 1, 0]
    assert sampled.counts == {"groups/sampled": 4, "groups/dropped": 2}
    assert said == ["step 1: dynamic sampling: 2 of 4 groups dropped as all right or all wrong"]
    assert made.order.next() == [4, 5]  # a next step goes on after what was asked


def test_mixed_groups_beyond_the_step_are_counted_too(collector: Any) -> None:
    made, _, said = collector({0: 2, 1: 1, 2: 1, 3: 1}, DYNAMIC)
    assert asked(made.collect(0).rollouts) == [1, 2]
    assert said[0].endswith(
        "1 of 4 groups dropped as all right or all wrong; 1 mixed ones dropped beyond the 2 of the step"
    )


def test_the_bound_ends_it_and_the_step_keeps_its_size(collector: Any) -> None:
    made, script, said = collector({5: 1}, DYNAMIC)
    sampled = made.collect(0)
    assert len(script.limits) == 3
    assert asked(sampled.rollouts) == [0, 5]
    assert sampled.counts == {"groups/sampled": 6, "groups/dropped": 4}
    assert said[0].endswith("4 of 6 groups dropped as all right or all wrong; only 1 are mixed: 1 others stay")


def test_no_question_is_asked_twice_in_a_step(collector: Any) -> None:
    made, script, _ = collector({}, "algorithm.dynamic_sampling_rounds=9")
    sampled = made.collect(0)
    assert len(script.limits) == 4 and sampled.counts["groups/sampled"] == 8


@pytest.mark.parametrize("rounds", [0, 2])
def test_where_all_are_mixed_nothing_is_dropped(collector: Any, rounds: int) -> None:
    made, script, said = collector({0: 1, 1: 1}, f"algorithm.dynamic_sampling_rounds={rounds}")
    assert asked(made.collect(0).rollouts) == [0, 1]
    assert len(script.limits) == 1 and said == []


def test_the_limit_rises_by_step(collector: Any) -> None:
    made, script, _ = collector({}, "generation.response_length_schedule=[[2,80],[5,96]]", "reward.terms.length=1")
    rewards = [made.collect(step).rollouts.rewards.tolist()[0] for step in (0, 1, 2, 4, 5)]
    assert script.limits == [64, 64, 80, 80, 96]
    assert rewards == pytest.approx([1 - 3 / limit for limit in script.limits])  # a term sees the step's own limit


def test_the_shortest_right_answer_is_remembered_from_the_next_step_on(collector: Any) -> None:
    made, script, _ = collector({0: 1, 1: 2}, lengths={0: 7, 1: 5}, signals=[ShortestCorrect()])
    known = [made._sample([0, 1, 2], step, 0).rollouts.columns["shortest_correct"].tolist() for step in (0, 1)]
    assert known == [[0] * 6, [7, 7, 5, 5, 0, 0]]
    script.lengths = {0: 4, 1: 9}
    made._sample([0, 1], 2, 0)
    again, _, _ = collector({}, signals=[ShortestCorrect()])
    again.load_state_dict(made.state_dict())
    assert again.state_dict() == made.state_dict()
    assert again._sample([0, 1], 3, 0).rollouts.columns["shortest_correct"].tolist() == [4, 4, 5, 5]


@pytest.mark.parametrize("rounds", [0, 2])
def test_asked_ahead_a_step_is_the_same(collector: Any, rounds: int) -> None:
    right = {0: 1, 1: 1, 2: 1, 3: 0, 5: 1}
    steps = [], []
    for ahead, found in zip((False, True), steps, strict=True):
        made, _, _ = collector(right, f"algorithm.dynamic_sampling_rounds={rounds}", signals=[ShortestCorrect()])
        found.append(made.collect(0))
        if ahead:
            made.request_ahead(1)
            made.receive(1)
        found.append(made.collect(1))
    for one, other in zip(*steps, strict=True):
        assert list(one.texts) == list(other.texts) and one.counts == other.counts
        assert torch.equal(one.rollouts.columns["shortest_correct"], other.rollouts.columns["shortest_correct"])


def test_further_rounds_of_what_was_asked_ahead_sample_from_newer_weights(collector: Any) -> None:
    made, script, _ = collector({0: 1, 1: 2, 2: 1}, DYNAMIC)
    made.request_ahead(0)
    script.version = 1
    made.receive(1)
    rollouts = made.collect(0).rollouts
    assert asked(rollouts) == [0, 2] and rollouts.weight_versions.tolist() == [0, 0, 1, 1]


def test_until_its_turn_what_was_asked_ahead_leaves_no_trace_in_the_state(collector: Any) -> None:
    """So that a run that is resumed in between asks the same questions, and remembers nothing of their answers."""
    made, _, _ = collector({0: 1, 2: 1}, signals=[ShortestCorrect()])
    made.collect(0)
    before = made.state_dict()
    made.request_ahead(1)
    assert made.state_dict() == before
    made.receive(1)
    assert made.state_dict() == before
    again, _, _ = collector({0: 1, 2: 1}, signals=[ShortestCorrect()])
    again.load_state_dict(before)
    assert list(again.collect(1).texts) == list(made.collect(1).texts)
    assert again.state_dict() == made.state_dict() != before


@pytest.mark.parametrize("ahead", [False, True])
def test_a_step_that_is_given_up_leaves_no_trace_in_the_state(ahead: bool, collector: Any, monkeypatch: Any) -> None:
    """The next life asks the same questions, and remembers nothing of the answers that were graded before."""
    made, script, _ = collector({0: 1, 2: 1, 4: 1}, DYNAMIC, signals=[ShortestCorrect()])
    again, _, _ = collector({0: 1, 2: 1, 4: 1}, DYNAMIC, signals=[ShortestCorrect()])
    for one in (made, again):
        one.collect(0)
    before, calls, theirs = made.state_dict(), iter(range(9)), script.grade

    def grade(*request: Any) -> Any:
        if next(calls) == (0 if ahead else 1):
            raise StoppedError
        return theirs(*request)

    monkeypatch.setattr(script, "grade", grade)
    if ahead:
        made.request_ahead(1)
        made.receive(1)
    else:
        with pytest.raises(StoppedError):
            made.collect(1)
    assert made.state_dict() == before
    assert list(made.collect(1).texts) == list(again.collect(1).texts)


def test_an_empty_response_is_no_shortest_answer() -> None:
    empty = Rollouts.pack([[1]], [[]], [[]], [3], [False]).with_rewards([1.0])
    history = ShortestCorrect()
    history.annotate(empty)
    assert history.state_dict() == {}


def test_without_a_method_that_reads_it_nothing_is_remembered(collector: Any) -> None:
    made, _, _ = collector({0: 1})
    made.collect(0)
    assert list(made.state_dict()) == ["sampler"]


def test_mismatch_of_two_engines() -> None:
    old, theirs = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.0, -2.9], dtype=torch.float64)
    found = mismatch(old, theirs)
    delta = [0.5, 0.0, -0.1]
    assert found["mismatch/mean_abs"] == pytest.approx(0.2)
    assert found["mismatch/max_abs"] == pytest.approx(0.5)
    assert found["mismatch/mean_exp_abs"] == pytest.approx(sum(math.exp(abs(d)) for d in delta) / 3)
    assert found["mismatch/kl_k1"] == pytest.approx(-0.4 / 3)
    assert found["mismatch/kl_k3"] == pytest.approx(sum(math.exp(d) - 1 - d for d in delta) / 3)
    assert set(mismatch(old[:0], theirs[:0]).values()) == {0.0, 1.0}


@pytest.mark.parametrize("changed", [{"content": "new"}, {"questions": 9}])
def test_other_questions_are_refused_or_begun_anew(collector: Any, changed: dict[str, Any]) -> None:
    old, _, _ = collector({}, signals=[ShortestCorrect()])
    old.order._content = "old"
    old.collect(0)
    state = old.state_dict()
    state["sampler"] |= changed
    state["shortest_correct"] = {"0": 3}
    refusing, _, _ = collector({}, signals=[ShortestCorrect()])
    refusing.order._content = "old"
    with pytest.raises(UserError, match=r"data\.if_changed=restart"):
        refusing.load_state_dict(state)
    restarting, _, said = collector({}, "data.if_changed=restart", signals=[ShortestCorrect()])
    restarting.order._content = "old"
    restarting.load_state_dict(state)
    assert restarting.order.next() == [0, 1] and "the new questions begin" in said[-1]
    assert restarting.signals[0].state_dict() == {}, "nothing is remembered of the old ones"
