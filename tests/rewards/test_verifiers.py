"""The verifiers without mathematics, and the settings that choose one."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from user_module import beside_us

from nemo_disco.config.compose import compose
from nemo_disco.rewards import user_pool
from nemo_disco.rewards.registry import VERIFIERS, build_verifier
from nemo_disco.rewards.text_graders import ExactMatch, MultipleChoice, NumericMatch, TextGrader
from nemo_disco.rewards.user_graders import UserFunction
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.signals import StoppedError

CASES: list[tuple[type[TextGrader], str, str | list[str], float]] = [
    (ExactMatch, r"</think> It is \boxed{New  York}.", "New York", 1.0),
    (ExactMatch, "</think> New York\n", "New York", 1.0),
    (ExactMatch, "</think> new york", "New York", 0.0),
    (ExactMatch, "</think> 0.5", ["1/2", "0.5"], 1.0),
    (ExactMatch, "Berlin </think> Paris", "Berlin", 0.0),
    (NumericMatch, "#### 1,234", "1234", 1.0),
    (NumericMatch, "so 3 apples and 4 pears make 7.", "7", 1.0),
    (NumericMatch, "so 3 apples and 4 pears make 7.", "4", 0.0),
    (NumericMatch, r"\boxed{\frac{1}{2}} and then 9", "0.5", 1.0),
    (NumericMatch, "50%", "0.5", 1.0),
    (NumericMatch, "-2.5e3", "-2500", 1.0),
    (NumericMatch, "0.3333333333", "1/3", 1.0),
    (NumericMatch, "0.333", "1/3", 0.0),
    (NumericMatch, "none", "1", 0.0),
    (NumericMatch, "3-5", "-5", 0.0),
    (NumericMatch, "3-5", "5", 1.0),
    (NumericMatch, "on 2024-05-17", "-17", 0.0),
    (NumericMatch, "x=-5", "-5", 1.0),
    (NumericMatch, "it is \N{MINUS SIGN}5.", "-5", 1.0),
    (NumericMatch, "3 - -5", "-5", 1.0),
    (NumericMatch, "GPT-4", "-4", 0.0),
    (MultipleChoice, r"\boxed{A or C}", "A", 0.0),
    (MultipleChoice, r"\boxed{A, C}", "A", 0.0),
    (MultipleChoice, r"\boxed{(A) and (C)}", "A", 0.0),
    (MultipleChoice, r"\boxed{A/C}", "A", 0.0),
    (MultipleChoice, r"\boxed{\text{A or C}}", "A", 0.0),
    (MultipleChoice, "The answer is A or C.", "A", 0.0),
    (MultipleChoice, "A. B. C. D", "A", 0.0),
    (MultipleChoice, r"\boxed{A. B. C. D}", "A", 0.0),
    (MultipleChoice, r"\boxed{(A)(B)}", "A", 0.0),
    (MultipleChoice, "The answer is A. B. C. D.", "A", 0.0),
    (MultipleChoice, "A. Paris\nB. London", "A", 0.0),
    (MultipleChoice, r"\boxed{(A) Paris or (B) London}", "A", 0.0),
    (MultipleChoice, r"\boxed{C. J. K. Rowling}", "C", 1.0),
    (MultipleChoice, "C. It is blue, so (A) and (B) are wrong.", "C", 1.0),
    (MultipleChoice, r"\boxed{\text{(C) Paris}}", "C", 1.0),
    (MultipleChoice, r"\boxed{\textbf{C}}", "C", 1.0),
    (MultipleChoice, r"\boxed{C. Paris}", "C", 1.0),
    (MultipleChoice, r"\boxed{$C$}", "C", 1.0),
    (MultipleChoice, "I choose C", "C", 1.0),
    (MultipleChoice, "I choose C", "I", 0.0),
    (MultipleChoice, "I'd go with (D).", "D", 1.0),
    (MultipleChoice, "I pick option B because it fits.", "B", 1.0),
    (MultipleChoice, "C is correct.", "C", 1.0),
    (MultipleChoice, "**C**", "C", 1.0),
    (MultipleChoice, "The answer is a number", "A", 0.0),
    (MultipleChoice, "The answer is A cat", "A", 0.0),
    (MultipleChoice, "A cat", "A", 0.0),
    (MultipleChoice, "I think so", "I", 0.0),
    (MultipleChoice, r"\boxed{C}", "C", 1.0),
    (MultipleChoice, r"\boxed{\text{(c)}}", "(C)", 1.0),
    (MultipleChoice, "A or B? The answer is (B).", "B", 1.0),
    (MultipleChoice, "A or B? The answer is **A**.", "B", 0.0),
    (MultipleChoice, "B", "B) Berlin", 1.0),
    (MultipleChoice, "Berlin of course", "B", 0.0),
]


@pytest.mark.parametrize(("kind", "response", "gold", "reward"), CASES)
def test_verdicts(kind: type[TextGrader], response: str, gold: str | list[str], reward: float) -> None:
    with kind() as verifier:
        [verdict] = verifier.grade_with_reasons([response], [gold])
    assert verdict.reward == reward and (verdict.reason == "correct") == (reward == 1.0)


WRONG = {ExactMatch: "wrong", NumericMatch: "wrong", MultipleChoice: "no choice"}


@pytest.mark.parametrize("kind", WRONG)
def test_thinking_may_be_required(kind: type[TextGrader]) -> None:
    verifier = kind(require_think=True)
    assert [v.reason for v in verifier.grade_with_reasons(["7", "</think> 7 "], ["7", "8"])] == [
        "no </think>",
        WRONG[kind],
    ]


@pytest.mark.parametrize(("tolerance", "reward"), [(0.0, 0.0), (0.01, 1.0)])
def test_a_tolerance_is_a_share_of_the_answer(tolerance: float, reward: float) -> None:
    assert NumericMatch(tolerance=tolerance).grade(["99.5"], ["100"]) == [reward]


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
    return beside_us(tmp_path / "my_functions.py", FUNCTIONS, monkeypatch)


def test_a_function_of_yours_sees_the_whole_response_and_may_shape(functions: Path) -> None:
    with UserFunction("my_functions:half") as half:
        [verdict] = half.grade_with_reasons(["thought </think> 4"], [["4", "5"]])
    assert (verdict.reward, verdict.reason) == (0.5, "reward 0.5")
    with (
        UserFunction("my_functions:bad") as bad,
        pytest.raises(UserError, match=rf"my_functions:bad: {functions}:\d+ must return a finite number; .* nan"),
    ):
        bad.grade(["x"], ["y"])


@pytest.mark.usefixtures("functions")
def test_a_function_of_yours_that_hangs_costs_its_response_only(caplog: pytest.LogCaptureFixture) -> None:
    """... and its own processes with it; one that ends its process ends the run."""
    began = time.monotonic()
    with UserFunction("my_functions:slow", timeout=2.0, workers=2) as slow:
        verdicts = slow.grade_with_reasons(["a", "hang", "b", "hang", "c"], ["x"] * 5)
    assert [v.reason for v in verdicts] == ["correct", "timeout", "correct", "timeout", "correct"]
    assert time.monotonic() - began < 300 and "reward.timeout allows (2 s)" in caplog.text
    with UserFunction("my_functions:dead") as dead, pytest.raises(UserError, match="ended its process with 7"):
        dead.grade(["x"], ["y"])


@pytest.mark.usefixtures("functions")
def test_a_request_to_stop_leaves_calls_that_hang_one_time_limit_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """... all together, those that have not begun included; and leaving does not wait for the others."""
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


def test_a_module_of_yours_is_imported_in_other_processes_alone_and_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = beside_us(tmp_path / "my_import.py", IMPORT, monkeypatch)
    monkeypatch.setenv("IMPORT_S", "0")
    chosen = settings("reward.verifier=my_import:judge", "reward.require_think=false")
    with build_verifier(chosen, workers=1) as judge:
        assert judge.grade(["a"], ["x"]) == [1.0]
    assert file.stem not in sys.modules
    monkeypatch.setenv("IMPORT_S", "1000")
    monkeypatch.setattr(user_pool, "START_S", 0.2)
    with pytest.raises(UserError, match=r"reward.verifier=my_import:judge: its import was not done after 0.2 s"):
        build_verifier(chosen, workers=1)


@pytest.mark.usefixtures("functions")
def test_functions_of_yours_are_called_side_by_side(tmp_path: Path) -> None:
    """Each of the eight calls returns once all have begun."""
    (tmp_path / "begun").mkdir()
    with UserFunction("my_functions:together", timeout=120.0, workers=8) as together:
        calls = [str(tmp_path / f"begun/{i}") for i in range(8)]
        assert together.grade(calls, [str(tmp_path / "begun")] * 8) == [1.0] * 8


def settings(*overrides: str) -> Any:
    return compose("quickstart", [*overrides]).reward


@pytest.mark.parametrize("name", VERIFIERS)
def test_each_verifier_is_chosen_by_name(name: str) -> None:
    with build_verifier(settings(f"reward.verifier={name}"), workers=1) as verifier:
        assert isinstance(verifier, VERIFIERS[name])  # type: ignore[arg-type]


def test_a_verifier_of_yours_is_found_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    chosen = ("reward.verifier=my_reward:Strict", "reward.parameters.limit=3")
    with build_verifier(settings(*chosen, "reward.timeout=60"), workers=1) as mine:
        verdicts = mine.grade_with_reasons(["</think> \\boxed{4}", "</think> \\boxed{5}"], ["4", ["5", "6"]])
        assert [(v.reward, v.reason) for v in verdicts] == [(0.0, "over 3"), (1.0, "correct")]
        with pytest.raises(UserError, match=rf"my_reward:Strict raised KeyError at {tmp_path}/my_reward.py:\d+: 'odd'"):
            mine.grade(["odd"], ["1"])


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


def test_a_class_of_yours_that_hangs_costs_its_response_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    beside_us(tmp_path / "my_hanging_judge.py", HANGS, monkeypatch)
    chosen = ("reward.verifier=my_hanging_judge:Judge", "reward.parameters.factor=0.5", "reward.timeout=2")
    with build_verifier(settings(*chosen), workers=2) as judge:
        assert judge.grade(["a", "hang", "b"], ["x"] * 3) == [0.5, 0.0, 0.5]
        assert [v.reason for v in judge.grade_with_reasons(["hang", "c"], ["x"] * 2)] == ["timeout", "mine"]
    assert "reward.verifier=my_hanging_judge:Judge took longer than reward.timeout" in caplog.text


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("reward.verifier=maths", "choose one of math, exact"),
        ("reward.verifier=nowhere:f", "importing nowhere raised ModuleNotFoundError"),
        ("reward.parameters.tolerance=1", "math takes no 'tolerance'; it takes no parameters"),
    ],
)
def test_what_there_is_not_is_refused(override: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        build_verifier(settings(override), workers=1)
