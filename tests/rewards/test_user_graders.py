"""Graders that a user writes, as a function or a class, and the choice of a grader by `reward.verifier`."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from user_module import write_user_module

from nemo_disco.config.compose import compose
from nemo_disco.rewards import user_pool
from nemo_disco.rewards.registry import VERIFIERS, build_verifier
from nemo_disco.rewards.user_graders import UserFunction
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.stop_signals import StoppedError

FUNCTIONS = """
import os, time
def half(response, answers):
    print("not a reply")
    return 0.5 if (response, answers) == ("thought </think> 4", ("4", "5")) else 0.0
def bad(response, answers):
    return float("nan")
def slow(response, answers):
    if response == "hang":
        os.system("sleep 1000")
    return 1.0
def dead(response, answers):
    os._exit(7)
def together(response, answers):
    open(response, "w").close()
    while len(os.listdir(answers[0])) < 8:
        time.sleep(0.01)
    return 1.0
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write_user_module(tmp_path / "my_functions.py", FUNCTIONS, monkeypatch)


def test_a_users_function_gets_the_whole_response_and_may_give_any_reward(functions: Path) -> None:
    with UserFunction("my_functions:half") as half:
        [verdict] = half.grade_with_reasons(["thought </think> 4"], [["4", "5"]])
    assert (verdict.reward, verdict.reason) == (0.5, "reward 0.5")
    with (
        UserFunction("my_functions:bad") as bad,
        pytest.raises(UserError, match=rf"my_functions:bad: {functions}:\d+ must return a finite number; .* nan"),
    ):
        bad.grade(["x"], ["y"])


@pytest.mark.usefixtures("functions")
def test_a_users_function_that_hangs_gives_only_its_response_0(caplog: pytest.LogCaptureFixture) -> None:
    """The call's process and those that it started are killed. A function that ends its own process ends the run."""
    began = time.monotonic()
    with UserFunction("my_functions:slow", timeout=2.0, workers=2) as slow:
        verdicts = slow.grade_with_reasons(["a", "hang", "b", "hang", "c"], ["x"] * 5)
    assert [v.reason for v in verdicts] == ["correct", "timeout", "correct", "timeout", "correct"]
    assert time.monotonic() - began < 300 and "reward.timeout allows (2 s)" in caplog.text
    with (
        UserFunction("my_functions:dead") as dead,
        pytest.raises(UserError, match="with exit code 7"),
    ):
        dead.grade(["x"], ["y"])


@pytest.mark.usefixtures("functions")
def test_after_a_request_to_stop_hanging_calls_get_one_more_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """All calls share this one limit, also those that have not begun; `close` waits for none of them."""
    with UserFunction("my_functions:slow", timeout=600.0, workers=1) as slow:
        threading.Timer(1.0, lambda: monkeypatch.setattr(user_pool, "seconds_since_stop", lambda: 601.0)).start()
        began = time.monotonic()
        with pytest.raises(StoppedError):
            slow.grade(["hang"] * 50, ["x"] * 50)
        monkeypatch.setattr(user_pool, "seconds_since_stop", lambda: 599.0)
        assert slow.grade(["a"], ["x"]) == [1.0]
        slow._pool.submit("hang", ("x",))
    assert time.monotonic() - began < 300


IMPORT = """
import os, time
time.sleep(float(os.environ["IMPORT_S"]))
def judge(response, answers):
    return 1.0
"""


def test_a_users_module_is_imported_in_other_processes_only_and_within_a_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_user_module(tmp_path / "my_import.py", IMPORT, monkeypatch)
    monkeypatch.setenv("IMPORT_S", "0")
    config = settings("reward.verifier=my_import:judge", "reward.require_think=false")
    with build_verifier(config, workers=1) as judge:
        assert judge.grade(["a"], ["x"]) == [1.0]
    assert file.stem not in sys.modules
    monkeypatch.setenv("IMPORT_S", "1000")
    monkeypatch.setattr(user_pool, "START_S", 0.2)
    with pytest.raises(UserError, match=r"reward.verifier=my_import:judge: its import took longer than 0.2 s"):
        build_verifier(config, workers=1)


@pytest.mark.usefixtures("functions")
def test_users_functions_are_called_in_parallel(tmp_path: Path) -> None:
    """Each of the eight calls returns only after all have begun."""
    (tmp_path / "begun").mkdir()
    with UserFunction("my_functions:together", timeout=120.0, workers=8) as together:
        calls = [str(tmp_path / f"begun/{i}") for i in range(8)]
        assert together.grade(calls, [str(tmp_path / "begun")] * 8) == [1.0] * 8


def settings(*overrides: str) -> Any:
    return compose("quickstart", [*overrides]).reward


@pytest.mark.parametrize("name", VERIFIERS)
def test_each_grader_is_chosen_by_name(name: str) -> None:
    with build_verifier(settings(f"reward.verifier={name}"), workers=1) as verifier:
        assert isinstance(verifier, VERIFIERS[name])  # type: ignore[arg-type]


def test_a_users_grader_is_imported_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_reward.py").write_text(
        "from nemo_disco.rewards import MathGrader\n"
        "def shout(response, answers):\n    return float(response.isupper())\n"
        "class Strict(MathGrader):\n    def __init__(self, limit, **rest):\n        super().__init__(**rest)\n"
        "        self.limit = limit\n"
        "    def grade(self, responses, answers):\n        raise KeyError(*responses)\n"
        "    def grade_with_reasons(self, responses, answers):\n"
        "        seen = super().grade_with_reasons(responses, answers)\n"
        "        return [type(v)(0.0, 'over 3') if '4' in responses[0] and self.limit == 3 else v for v in seen]\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    function = build_verifier(settings("reward.verifier=my_reward:shout", "reward.require_think=false"), workers=1)
    assert function.grade(["YES", "no"], ["", ""]) == [1.0, 0.0]
    with pytest.raises(UserError, match="neither function nor class"):
        build_verifier(settings("reward.verifier=my_reward:number"), workers=1)
    config = settings("reward.verifier=my_reward:Strict", "reward.parameters.limit=3", "reward.timeout=60")
    with build_verifier(config, workers=1) as grader:
        verdicts = grader.grade_with_reasons(["</think> \\boxed{4}", "</think> \\boxed{5}"], ["4", ["5", "6"]])
        assert [(v.reward, v.reason) for v in verdicts] == [(0.0, "over 3"), (1.0, "correct")]
        with pytest.raises(UserError, match=rf"my_reward:Strict raised KeyError at {tmp_path}/my_reward.py:\d+: 'odd'"):
            grader.grade(["odd"], ["1"])


HANGS = """
import time
from nemo_disco.rewards import Verdict
class Judge:
    def __init__(self, factor):
        self.factor = factor
    def grade(self, responses, answers):
        return [v.reward for v in self.grade_with_reasons(responses, answers)]
    def grade_with_reasons(self, responses, answers):
        time.sleep(1000 if "hang" in responses else 0)
        return [Verdict(self.factor, "mine") for _ in responses]
"""


def test_a_users_class_that_hangs_gives_only_its_response_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_user_module(tmp_path / "my_hanging_judge.py", HANGS, monkeypatch)
    config = settings("reward.verifier=my_hanging_judge:Judge", "reward.parameters.factor=0.5", "reward.timeout=2")
    with build_verifier(config, workers=2) as judge:
        assert judge.grade(["a", "hang", "b"], ["x"] * 3) == [0.5, 0.0, 0.5]
        assert [v.reason for v in judge.grade_with_reasons(["hang", "c"], ["x"] * 2)] == ["timeout", "mine"]
    assert "reward.verifier=my_hanging_judge:Judge took longer than reward.timeout" in caplog.text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward.verifier=maths", "choose one of math, exact"),
        ("reward.verifier=nowhere:f", "importing nowhere raised ModuleNotFoundError"),
        ("reward.parameters.tolerance=1", "math takes no 'tolerance'; it takes no parameters"),
    ],
)
def test_an_unknown_verifier_or_parameter_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_verifier(settings(override), workers=1)
