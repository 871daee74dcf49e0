"""An evaluation in batches: the same whatever the batch, and going on where an earlier life of it was killed."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from user_module import beside_us

from nemo_disco.commands.components import Components, build_evaluator
from nemo_disco.config.compose import compose
from nemo_disco.config.schema import RunConfig
from nemo_disco.data.questions import Question
from nemo_disco.generation.engine import Finished, Response, SamplingParams
from nemo_disco.rewards.registry import hash_verifier
from nemo_disco.rewards.text_graders import NumericMatch
from nemo_disco.rollout import evaluation as evaluation_module
from nemo_disco.rollout import grading
from nemo_disco.rollout.evaluation import Evaluator
from nemo_disco.rollout.prompts import PromptSet


class Words:
    """A tokenizer of digits."""

    def decode(self, token_ids: Sequence[int], **_: Any) -> str:
        return "".join(map(str, token_ids))


class Dice:
    """An engine that throws dice by the seed; it dies after so many calls. streams: it hands over what is finished."""

    def __init__(self, calls: int = 1000, streams: bool = False) -> None:
        self.calls, self.streams, self.asked = calls, streams, 0

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], _: SamplingParams, finished: Finished
    ) -> list[Response]:
        if self.calls == 0:
            raise KeyboardInterrupt
        self.calls -= 1
        self.asked += len(prompts)
        faces = [random.Random(f"{seed}{prompt}").randrange(3) for prompt, seed in zip(prompts, seeds, strict=True)]
        responses = [
            Response(np.array([1, face]), np.zeros(2, np.float32), "length" if face == 2 else "stop", 0)
            for face in faces
        ]
        for i in range(len(responses)) if self.streams else ():
            finished(i, responses[i])
        return responses


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process alone: the one that another test left, or a new one."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def evaluator(config: RunConfig, engine: Any) -> Evaluator:
    return build_evaluator(config, Components(policy=None, engine=engine, grader=NumericMatch()))  # type: ignore[arg-type]


def evaluate(engine: Dice, path: Path | None = None, weights: str = "w", **more: Any) -> Any:
    asked = [Question(i, f"q{i}", ("1", "10"), "f") for i in range(7)]
    questions = PromptSet("dice", asked, [[i] for i in range(7)], Words())
    config = compose("quickstart", ["evaluation.samples=4", "reward.require_think=false"])
    with tempfile.TemporaryDirectory() as directory:
        path = path or Path(directory) / "s.jsonl"
        return evaluator(config, engine).evaluate(questions, 3, path, {"weights": weights}, **more)


def values(result: Any) -> list[Any]:
    return [getattr(result, name).tolist() for name in ("correct", "lengths", "truncated", "greedy_correct", "votes")]


@pytest.mark.usefixtures("alone")
def test_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(Dice())
    assert whole.correct.shape == (7, 4) and 0 < whole.correct.mean() < 1 and whole.step == 3
    for batch in (1, 8, 13):
        monkeypatch.setattr(evaluation_module, "BATCH", batch)
        assert values(evaluate(Dice())) == values(whole)


@pytest.mark.usefixtures("alone")
def test_what_an_engine_hands_over_is_graded_as_it_finishes(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(Dice())
    monkeypatch.setattr(grading, "on_shares", lambda *_: pytest.fail("something was left for the end"))
    assert values(evaluate(Dice(streams=True))) == values(whole)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("calls", [0, 1, 2, 5, 6])
def test_killed_it_goes_on(calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four batches of two calls each (sampled, greedy): what was whole is not asked again."""
    monkeypatch.setattr(evaluation_module, "BATCH", 8)
    path = tmp_path / "s.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate(Dice(calls), path)
    again = Dice()
    result = evaluate(again, path)
    assert again.asked == 7 * 5 - calls // 2 * 10
    assert values(result) == values(evaluate(Dice()))
    other = Dice()
    evaluate(other, path, weights="other")
    assert other.asked == 7 * 5


@pytest.mark.usefixtures("alone")
def test_asked_to_stop_it_stops_between_batches_and_goes_on_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_module, "BATCH", 8)
    path, stops = tmp_path / "s.jsonl", iter([False, False, True])
    first = Dice()
    assert evaluate(first, path, must_stop=lambda: next(stops)) is None and first.asked == 2 * 10
    again = Dice()
    assert values(evaluate(again, path)) == values(evaluate(Dice())) and again.asked == 7 * 5 - 2 * 10


@pytest.mark.usefixtures("alone")
def test_what_an_engine_handed_over_before_it_died_is_not_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate(Dice(1, streams=True), path)  # in the greedy half of its one batch
    again = Dice(streams=True)
    assert values(evaluate(again, path)) == values(evaluate(Dice())) and again.asked == 7


@pytest.mark.parametrize(
    "override",
    [
        *("trainer.precision=bf16", "generation.quantization=fp8", "generation.options.x=1", "algorithm.threshold=0.6"),
        *("model.fp8=current", "evaluation.samples=5", "reward.verifier=exact", "seed=2", "reward.timeout=1"),
    ],
)
def test_another_evaluation_has_another_identity(override: str) -> None:
    questions = PromptSet("dice", [Question(0, "q", ("1",), "f")], [[0]], Words())
    one, other = (evaluator(compose("quickstart", o), None).identity(questions, 3) for o in ([], [override]))
    assert one != other


def test_an_edited_verifier_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = []
    for number in (0, 1):
        beside_us(tmp_path / "my_judge.py", f"def judge(response, answers):\n    return {number}.0\n", monkeypatch)
        config = compose("quickstart", ["reward.verifier=my_judge:judge", "reward.require_think=false"]).reward
        codes.append(hash_verifier(config))
    assert len({"", *codes}) == 3
