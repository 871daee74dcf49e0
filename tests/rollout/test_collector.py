"""The rollouts of a step: dynamic sampling and its bound, a rising response limit, HAPO's memory, and the mismatch."""

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
from nemo_disco.generation.engine import Deliver, PendingResponses, Response, SamplingParams
from nemo_disco.policy import parallel
from nemo_disco.rewards import Rewards
from nemo_disco.rollout.collector import Collector
from nemo_disco.rollout.prompts import PromptSet
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.stop_signals import StoppedError


class Tokenizer:
    """Decodes each token as its number."""

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return " ".join(map(str, tokens))


class Scripted:
    """A fake engine and the grader of its responses. A response to the prompt [q] has the tokens q, its number among
    the responses to q, and zeros up to its length."""

    def __init__(self, right: dict[int, int], lengths: dict[int, int]) -> None:
        """right: number of right responses by question. lengths: of responses by question, in tokens; 3 if missing."""
        self.right, self.lengths, self.limits, self.version = right, lengths, [], 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingParams,
        deliver: Deliver,  # noqa: ARG002
    ) -> list[Response]:
        assert len(set(seeds)) == len(seeds)
        self.limits.append(sampling.max_response_length)
        numbers: dict[int, int] = {}
        responses = []
        for (question,) in prompts:
            numbers[question] = numbers.get(question, -1) + 1
            tokens = [question, numbers[question]] + [0] * (self.lengths.get(question, 3) - 2)
            responses.append(Response(np.array(tokens), -np.ones(len(tokens), np.float32), "length", self.version))
        return responses

    def start_generating(self, *request: Any) -> PendingResponses:
        responses = self.generate(*request)
        return lambda _: responses

    def grade(self, texts: Sequence[str], answers: Sequence[Any]) -> list[float]:  # noqa: ARG002
        numbers = [list(map(int, text.split()[:2])) for text in texts]
        return [float(number < self.right.get(question, 0)) for question, number in numbers]


@pytest.fixture
def make_collector(tmp_path: Path) -> Any:
    """make_collector(right, *overrides) returns a collector of 8 questions, 2 a step with 2 responses each; its fake
    engine; and the lines that it logs."""
    parallel.start(model_config(tmp_path))
    lines: list[str] = []

    def make(right: dict[int, int], *overrides: str, lengths: dict[int, int] | None = None, **options: Any) -> Any:
        n = 8
        group = "generation.responses_per_question=2"
        step = ("data.questions_per_step=2", "algorithm.mini_batch_questions=2", "data.shuffle=false")
        config = compose("quickstart", [group, *step, *overrides])
        script = Scripted(right, lengths or {})
        collector = Collector(
            config.generation,
            engine=script,  # type: ignore[arg-type]
            grader=script,  # type: ignore[arg-type]
            prompts=PromptSet(
                "q", [Question(i, f"{i}?", ("",), "") for i in range(n)], [[i] for i in range(n)], Tokenizer()
            ),
            order=QuestionOrder(n, 2, 1, False),
            log=lines.append,
            rewards=Rewards(config.reward),
            seed=config.seed,
            threshold=config.algorithm.threshold,
            dynamic_sampling_rounds=config.algorithm.dynamic_sampling_rounds,
            restart_if_changed=config.data.if_changed == "restart",
            **options,
        )
        return collector, script, lines

    return make


def question_ids(rollouts: Rollouts) -> list[int]:
    return list(dict.fromkeys(rollouts.question_ids.tolist()))


DYNAMIC = "algorithm.dynamic_sampling_rounds=2"


def test_questions_are_asked_until_enough_groups_are_mixed(make_collector: Any) -> None:
    collector, _, lines = make_collector({0: 2, 1: 1, 2: 0, 3: 1}, DYNAMIC)
    batch = collector.collect(0)
    assert question_ids(batch.rollouts) == [1, 3]
    assert [q.id for q in batch.prompts.questions] == [1, 1, 3, 3]
    assert list(batch.texts) == ["1 0 0", "1 1 0", "3 0 0", "3 1 0"]
    assert batch.rollouts.rewards.tolist() == [1, 0, 1, 0]
    assert batch.counts == {"groups/sampled": 4, "groups/dropped": 2}
    assert lines == ["step 1: dynamic sampling: 2 of 4 groups dropped as all right or all wrong"]
    assert collector.order.next() == [4, 5]  # the next step continues after the last requested question


def test_mixed_groups_beyond_the_step_are_counted_too(make_collector: Any) -> None:
    collector, _, lines = make_collector({0: 2, 1: 1, 2: 1, 3: 1}, DYNAMIC)
    assert question_ids(collector.collect(0).rollouts) == [1, 2]
    assert lines[0].endswith(
        "1 of 4 groups dropped as all right or all wrong; 1 mixed ones dropped beyond the 2 of the step"
    )


def test_dynamic_sampling_ends_at_its_bound_and_the_step_keeps_its_size(make_collector: Any) -> None:
    collector, script, lines = make_collector({5: 1}, DYNAMIC)
    batch = collector.collect(0)
    assert len(script.limits) == 3
    assert question_ids(batch.rollouts) == [0, 5]
    assert batch.counts == {"groups/sampled": 6, "groups/dropped": 4}
    assert lines[0].endswith("4 of 6 groups dropped as all right or all wrong; only 1 are mixed: 1 others stay")


def test_no_question_is_asked_twice_in_a_step(make_collector: Any) -> None:
    collector, script, _ = make_collector({}, "algorithm.dynamic_sampling_rounds=9")
    batch = collector.collect(0)
    assert len(script.limits) == 4 and batch.counts["groups/sampled"] == 8


@pytest.mark.parametrize("rounds", [0, 2])
def test_where_all_are_mixed_nothing_is_dropped(make_collector: Any, rounds: int) -> None:
    collector, script, lines = make_collector({0: 1, 1: 1}, f"algorithm.dynamic_sampling_rounds={rounds}")
    assert question_ids(collector.collect(0).rollouts) == [0, 1]
    assert len(script.limits) == 1 and lines == []


def test_the_limit_rises_by_step(make_collector: Any) -> None:
    collector, script, _ = make_collector(
        {}, "generation.response_length_schedule=[[2,80],[5,96]]", "reward.terms.length=1"
    )
    rewards = [collector.collect(step).rollouts.rewards.tolist()[0] for step in (0, 1, 2, 4, 5)]
    assert script.limits == [64, 64, 80, 80, 96]
    assert rewards == pytest.approx([1 - 3 / limit for limit in script.limits])  # a term sees the step's own limit


def test_the_shortest_right_answer_is_remembered_from_the_next_step_on(make_collector: Any) -> None:
    collector, script, _ = make_collector({0: 1, 1: 2}, lengths={0: 7, 1: 5}, signals=[ShortestCorrect()])
    columns = [collector._sample([0, 1, 2], step, 0).rollouts.columns["shortest_correct"].tolist() for step in (0, 1)]
    assert columns == [[0] * 6, [7, 7, 5, 5, 0, 0]]
    script.lengths = {0: 4, 1: 9}
    collector._sample([0, 1], 2, 0)
    resumed, _, _ = make_collector({}, signals=[ShortestCorrect()])
    resumed.load_state_dict(collector.state_dict())
    assert resumed.state_dict() == collector.state_dict()
    assert resumed._sample([0, 1], 3, 0).rollouts.columns["shortest_correct"].tolist() == [4, 4, 5, 5]


@pytest.mark.parametrize("rounds", [0, 2])
def test_a_step_requested_ahead_has_the_same_rollouts(make_collector: Any, rounds: int) -> None:
    right = {0: 1, 1: 1, 2: 1, 3: 0, 5: 1}
    steps = [], []
    for ahead, batches in zip((False, True), steps, strict=True):
        collector, _, _ = make_collector(
            right, f"algorithm.dynamic_sampling_rounds={rounds}", signals=[ShortestCorrect()]
        )
        batches.append(collector.collect(0))
        if ahead:
            collector.request_ahead(1)
            collector.receive(1)
        batches.append(collector.collect(1))
    for one, other in zip(*steps, strict=True):
        assert list(one.texts) == list(other.texts) and one.counts == other.counts
        assert torch.equal(one.rollouts.columns["shortest_correct"], other.rollouts.columns["shortest_correct"])


def test_further_rounds_of_a_step_requested_ahead_sample_from_newer_weights(make_collector: Any) -> None:
    collector, script, _ = make_collector({0: 1, 1: 2, 2: 1}, DYNAMIC)
    collector.request_ahead(0)
    script.version = 1
    collector.receive(1)
    rollouts = collector.collect(0).rollouts
    assert question_ids(rollouts) == [0, 2] and rollouts.weight_versions.tolist() == [0, 0, 1, 1]


def test_a_step_requested_ahead_leaves_no_trace_in_the_state_until_it_is_collected(make_collector: Any) -> None:
    """A run that is resumed in between must request the same questions, and remember nothing of the responses."""
    collector, _, _ = make_collector({0: 1, 2: 1}, signals=[ShortestCorrect()])
    collector.collect(0)
    before = collector.state_dict()
    collector.request_ahead(1)
    assert collector.state_dict() == before
    collector.receive(1)
    assert collector.state_dict() == before
    resumed, _, _ = make_collector({0: 1, 2: 1}, signals=[ShortestCorrect()])
    resumed.load_state_dict(before)
    assert list(resumed.collect(1).texts) == list(collector.collect(1).texts)
    assert resumed.state_dict() == collector.state_dict() != before


@pytest.mark.parametrize("ahead", [False, True])
def test_a_step_that_is_given_up_leaves_no_trace_in_the_state(
    ahead: bool, make_collector: Any, monkeypatch: Any
) -> None:
    """The next life must request the same questions, and remember nothing of the responses that were graded before."""
    collector, script, _ = make_collector({0: 1, 2: 1, 4: 1}, DYNAMIC, signals=[ShortestCorrect()])
    resumed, _, _ = make_collector({0: 1, 2: 1, 4: 1}, DYNAMIC, signals=[ShortestCorrect()])
    for one in (collector, resumed):
        one.collect(0)
    before, calls, real_grade = collector.state_dict(), iter(range(9)), script.grade

    def grade(*request: Any) -> Any:
        if next(calls) == (0 if ahead else 1):
            raise StoppedError
        return real_grade(*request)

    monkeypatch.setattr(script, "grade", grade)
    if ahead:
        collector.request_ahead(1)
        collector.receive(1)
    else:
        with pytest.raises(StoppedError):
            collector.collect(1)
    assert collector.state_dict() == before
    assert list(collector.collect(1).texts) == list(resumed.collect(1).texts)


def test_an_empty_response_is_no_shortest_answer() -> None:
    empty = Rollouts.pack([[1]], [[]], [[]], [3], [False]).with_rewards([1.0])
    history = ShortestCorrect()
    history.annotate(empty)
    assert history.state_dict() == {}


def test_without_a_method_that_reads_it_nothing_is_remembered(make_collector: Any) -> None:
    collector, _, _ = make_collector({0: 1})
    collector.collect(0)
    assert list(collector.state_dict()) == ["sampler"]


def test_mismatch_of_two_engines() -> None:
    old, generation = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.0, -2.9], dtype=torch.float64)
    metrics = mismatch(old, generation)
    delta = [0.5, 0.0, -0.1]
    assert metrics["mismatch/mean_abs"] == pytest.approx(0.2)
    assert metrics["mismatch/max_abs"] == pytest.approx(0.5)
    assert metrics["mismatch/mean_exp_abs"] == pytest.approx(sum(math.exp(abs(d)) for d in delta) / 3)
    assert metrics["mismatch/kl_k1"] == pytest.approx(-0.4 / 3)
    assert metrics["mismatch/kl_k3"] == pytest.approx(sum(math.exp(d) - 1 - d for d in delta) / 3)
    assert set(mismatch(old[:0], generation[:0]).values()) == {0.0, 1.0}


@pytest.mark.parametrize("changes", [{"content": "new"}, {"questions": 9}])
def test_other_questions_are_refused_or_begin_anew(make_collector: Any, changes: dict[str, Any]) -> None:
    old, _, _ = make_collector({}, signals=[ShortestCorrect()])
    old.order._content = "old"
    old.collect(0)
    state = old.state_dict()
    state["sampler"] |= changes
    state["shortest_correct"] = {"0": 3}
    resumed, _, _ = make_collector({}, signals=[ShortestCorrect()])
    resumed.order._content = "old"
    with pytest.raises(UserError, match=r"data\.if_changed=restart"):
        resumed.load_state_dict(state)
    resumed, _, lines = make_collector({}, "data.if_changed=restart", signals=[ShortestCorrect()])
    resumed.order._content = "old"
    resumed.load_state_dict(state)
    assert resumed.order.next() == [0, 1] and "the new questions begin" in lines[-1]
    assert resumed.signals[0].state_dict() == {}, "the responses to the old questions are still remembered"
