"""The reward terms of a response, their sum, and a user's function: its value is added, its failures are reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from user_module import write_user_module

from nemo_disco.config.schema import RewardConfig
from nemo_disco.rewards import GradedResponse, Rewards
from nemo_disco.runtime.errors import UserError

RIGHT = GradedResponse(
    question="What is 1 + 1?",
    response=r"One more. </think> \boxed{2}",
    answers=("2",),
    verdict=1.0,
    correct=True,
    length=10,
    max_response_length=40,
    metadata={"level": 3},
)
WRONG = replace(RIGHT, response=r"No. </think> \boxed{3}", verdict=0.0, correct=False)


def build(preference: str | None = None, function: str | None = None, **terms: float) -> Rewards:
    """Rewards with these weights of the terms, 0 for the others."""
    weights = {"correctness": 0.0, "format": 0.0, "length": 0.0, "overlong": 0.0} | terms
    settings: dict[str, Any] = {
        "verifier": "math",
        "parameters": {},
        "require_think": True,
        "timeout": 2.0,
        "workers": 1,
    }
    columns = {} if preference is None else {"preference": preference}
    return Rewards(RewardConfig(terms=weights, function=function, overlong_buffer=None, **settings), columns)


def reward(rewards: Rewards, response: GradedResponse) -> float:
    return rewards.compute([response])[0][0]


def preference(rewards: Rewards, response: GradedResponse) -> float:
    return rewards.compute([response])[0][1]


def test_the_verdict_alone_is_the_reward_by_default() -> None:
    assert [reward(build(correctness=1.0), r) for r in (RIGHT, WRONG)] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("response", "value"),
    [
        (r"Think. </think> \boxed{2}", 1.0),
        (r"Think. \boxed{2}", 0.0),
        (r"Think. </think> 2", 0.0),
        (r"Think. </think> \boxed{2", 0.0),
        (r"Think. </think> \boxed{}", 0.0),
        (r"\boxed{1} </think> \boxed{7}", 1.0),
        ("", 0.0),
    ],
)
def test_format_is_1_for_a_complete_box_right_or_wrong(response: str, value: float) -> None:
    assert reward(build(format=1.0), replace(WRONG, response=response)) == value


@pytest.mark.parametrize(("length", "expected"), [(0, 0.0), (32, 0.0), (33, -0.125), (36, -0.5), (40, -1.0)])
def test_overlong_falls_to_minus_one_over_the_last_fifth(length: int, expected: float) -> None:
    assert reward(build(overlong=1.0), replace(RIGHT, length=length)) == expected


def test_length_is_drpos_length_reward() -> None:
    assert [reward(build(length=1.0), replace(RIGHT, length=n)) for n in (0, 10, 40)] == [1.0, 0.75, 0.0]


def test_terms_add_up() -> None:
    rewards = build(correctness=1.0, format=0.1, length=-0.2)
    assert reward(rewards, RIGHT) == pytest.approx(1 + 0.1 - 0.2 * 0.75)
    assert reward(rewards, WRONG) == pytest.approx(0.1 - 0.2 * 0.75)
    assert rewards.compute([RIGHT]) == [(reward(rewards, RIGHT),)]  # no columns were declared


@pytest.mark.parametrize(("name", "expected"), [("correctness", 0.0), ("format", 1.0), ("length", 0.75)])
def test_a_preference_is_any_of_the_terms(name: str, expected: float) -> None:
    assert preference(build(name, correctness=1.0), WRONG) == expected


FUNCTIONS = """
import math, time


def by_level(r):
    return 0.1 * r.metadata["level"] if r.correct else -len(r.question)


def raises(r):
    return 1 / (r.length - 10)


def not_a_number(r):
    return math.nan


def nothing(r):
    pass


def huge(r):
    return 10**5000


def hangs_on_wrong(r):
    time.sleep(0 if r.correct else 1000)
    return 5.0


CONSTANT = 1
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write_user_module(tmp_path / "my_rewards_of_this_test.py", FUNCTIONS, monkeypatch)


def test_a_users_function_gets_the_response_and_its_questions_metadata(module: Path) -> None:
    function = f"{module.stem}:by_level"
    assert reward(build(function=function, correctness=1.0), RIGHT) == pytest.approx(1.3)
    assert reward(build(function=function), WRONG) == -14.0
    assert preference(build(function), RIGHT) == pytest.approx(0.3)


def test_a_users_function_that_hangs_gives_0_with_a_warning(module: Path, caplog: pytest.LogCaptureFixture) -> None:
    function = f"{module.stem}:hangs_on_wrong"
    rewards = build(function, function=function, correctness=1.0)
    assert rewards.compute([RIGHT, WRONG, RIGHT]) == [(6.0, 5.0), (0.0, 0.0), (6.0, 5.0)]
    for key in ("reward.function", "algorithm.preference"):
        assert f"{key}={function} took longer than reward.timeout" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"reward.function=\S+:raises raised ZeroDivisionError at {path}:10: division by zero"),
        ("not_a_number", r"{path}:13 must return a finite number; it returned nan"),
        ("huge", r"{path}:\d+ must return a finite number; it returned a whole number that is too large"),
        ("nothing", r"{path}:17 must return a finite number; it returned None"),
    ],
)
def test_an_error_in_a_users_function_is_reported_with_file_and_line(module: Path, name: str, message: str) -> None:
    rewards = build(function=f"{module.stem}:{name}")
    with pytest.raises(UserError, match=message.format(path=module)) as error:
        reward(rewards, RIGHT)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"function": "my_rewards"}, r"reward.function=my_rewards must be module:function"),
        ({"function": "nowhere_at_all:f"}, r"reward.function=\S+: importing nowhere_at_all raised ModuleNotFoundError"),
        ({"function": "math:nothing"}, r"reward.function=math:nothing: .*math.* has no 'nothing'"),
        ({"function": "math:pi"}, r"reward.function=math:pi must be module:function"),
        ({"preference": "brevity"}, r"no reward term 'brevity'; known: correctness, format, length, overlong, or"),
        ({"preference": "math:pi"}, r"algorithm.preference=math:pi must be module:function"),
    ],
)
def test_an_unknown_function_or_preference_is_refused_by_name(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**arguments)  # type: ignore[arg-type]
