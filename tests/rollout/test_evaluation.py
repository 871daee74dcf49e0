"""Evaluation in batches: the size of a batch changes no result, and a killed evaluation goes on where it was."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from user_module import write_user_module

from nemo_disco.commands.components import Components, build_evaluator
from nemo_disco.config.compose import compose
from nemo_disco.config.schema import RunConfig
from nemo_disco.data.questions import Question
from nemo_disco.generation.engine import Deliver, Response, SamplingParams
from nemo_disco.rewards.registry import hash_verifier
from nemo_disco.rewards.text_graders import NumericMatch
from nemo_disco.rollout import evaluation as evaluation_module
from nemo_disco.rollout import grading
from nemo_disco.rollout.evaluation import Evaluator
from nemo_disco.rollout.prompts import PromptSet


class DigitTokenizer:
    """A tokenizer that decodes each token as its digits."""

    def decode(self, token_ids: Sequence[int], **_: Any) -> str:
        return "".join(map(str, token_ids))


class Dice:
    """An engine whose responses depend on prompt and seed. calls: it raises KeyboardInterrupt after so many calls;
    streams: it passes its responses to `deliver`; requests: number of responses that were requested."""

    def __init__(self, calls: int = 1000, streams: bool = False) -> None:
        self.calls, self.streams, self.requests = calls, streams, 0

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], _: SamplingParams, deliver: Deliver
    ) -> list[Response]:
        if self.calls == 0:
            raise KeyboardInterrupt
        self.calls -= 1
        self.requests += len(prompts)
        faces = [random.Random(f"{seed}{prompt}").randrange(3) for prompt, seed in zip(prompts, seeds, strict=True)]
        responses = [
            Response(np.array([1, face]), np.zeros(2, np.float32), "length" if face == 2 else "stop", 0)
            for face in faces
        ]
        for i in range(len(responses)) if self.streams else ():
            deliver(i, responses[i])
        return responses


@pytest.fixture
def process_group() -> Iterator[None]:
    """A process group of this process alone: the one that another test left, or a new one."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_evaluator(config: RunConfig, engine: Any) -> Evaluator:
    return build_evaluator(config, Components(policy=None, engine=engine, grader=NumericMatch()))  # type: ignore[arg-type]


def evaluate(engine: Dice, path: Path | None = None, weights: str = "w", **options: Any) -> Any:
    """Evaluate seven questions with four samples each, at step 3."""
    questions = [Question(i, f"q{i}", ("1", "10"), "f") for i in range(7)]
    prompts = PromptSet("dice", questions, [[i] for i in range(7)], DigitTokenizer())
    config = compose("quickstart", ["evaluation.samples=4", "reward.require_think=false"])
    with tempfile.TemporaryDirectory() as directory:
        path = path or Path(directory) / "s.jsonl"
        return make_evaluator(config, engine).evaluate(prompts, 3, path, {"weights": weights}, **options)


def values(result: Any) -> list[Any]:
    """The arrays of the result as lists."""
    return [getattr(result, name).tolist() for name in ("correct", "lengths", "truncated", "greedy_correct", "votes")]


@pytest.mark.usefixtures("process_group")
def test_the_size_of_a_batch_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(Dice())
    assert whole.correct.shape == (7, 4) and 0 < whole.correct.mean() < 1 and whole.step == 3
    for batch in (1, 8, 13):
        monkeypatch.setattr(evaluation_module, "BATCH", batch)
        assert values(evaluate(Dice())) == values(whole)


@pytest.mark.usefixtures("process_group")
def test_finished_responses_are_graded_while_others_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(Dice())
    monkeypatch.setattr(grading, "on_shares", lambda *_: pytest.fail("responses are graded only at the end"))
    assert values(evaluate(Dice(streams=True))) == values(whole)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("calls", [0, 1, 2, 5, 6])
def test_a_killed_evaluation_goes_on_after_its_last_complete_batch(
    calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are four batches of two calls each, one for samples and one for greedy responses. A complete batch is not
    requested again."""
    monkeypatch.setattr(evaluation_module, "BATCH", 8)
    path = tmp_path / "s.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate(Dice(calls), path)
    second = Dice()
    result = evaluate(second, path)
    assert second.requests == 7 * 5 - calls // 2 * 10
    assert values(result) == values(evaluate(Dice()))
    other = Dice()
    evaluate(other, path, weights="other")
    assert other.requests == 7 * 5


@pytest.mark.usefixtures("process_group")
def test_an_evaluation_that_must_stop_stops_between_batches_and_goes_on_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_module, "BATCH", 8)
    path, stops = tmp_path / "s.jsonl", iter([False, False, True])
    first = Dice()
    assert evaluate(first, path, must_stop=lambda: next(stops)) is None and first.requests == 2 * 10
    second = Dice()
    assert values(evaluate(second, path)) == values(evaluate(Dice())) and second.requests == 7 * 5 - 2 * 10


@pytest.mark.usefixtures("process_group")
def test_responses_that_finished_before_the_engine_died_are_not_requested_again(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate(Dice(1, streams=True), path)  # dies at the greedy responses of the only batch
    second = Dice(streams=True)
    assert values(evaluate(second, path)) == values(evaluate(Dice())) and second.requests == 7


@pytest.mark.parametrize(
    "override",
    [
        *("trainer.precision=bf16", "generation.quantization=fp8", "generation.options.x=1", "algorithm.threshold=0.6"),
        *("model.fp8=current", "evaluation.samples=5", "reward.verifier=exact", "seed=2", "reward.timeout=1"),
    ],
)
def test_another_evaluation_has_another_identity(override: str) -> None:
    prompts = PromptSet("dice", [Question(0, "q", ("1",), "f")], [[0]], DigitTokenizer())
    one, other = (make_evaluator(compose("quickstart", o), None).identity(prompts, 3) for o in ([], [override]))
    assert one != other


def test_an_edited_verifier_has_another_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = []
    for number in (0, 1):
        write_user_module(
            tmp_path / "my_judge.py", f"def judge(response, answers):\n    return {number}.0\n", monkeypatch
        )
        config = compose("quickstart", ["reward.verifier=my_judge:judge", "reward.require_think=false"]).reward
        hashes.append(hash_verifier(config))
    assert len({"", *hashes}) == 3
