"""No answer may exceed its time limit, end the pool, or run code. Each case here has stopped some grader."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_disco.rewards import MathGrader, Verdict
from nemo_disco.rewards.math.algebra_process import TICKS, processor_time

LIMIT = 1.0  # seconds of processor time
SLACK = 0.5
TOWER = r"\boxed{9^{9^{9^{9}}}}"


@pytest.fixture(scope="module")
def strict_grader() -> Iterator[MathGrader]:
    """A grader with a short time limit, whose processes have started."""
    with MathGrader(timeout=LIMIT, workers=2) as grader:
        grader.grade([r"\boxed{x+1}"], ["1+x"])  # starting up does not count as an answer's time
        yield grader


def processor_seconds(grader: MathGrader) -> float:
    """Seconds of processor time that the grader's judges have used, with the dead ones; exact while none is at work."""
    grader.grade([r"\boxed{2+x}"], ["x+2"])  # returns after all judges past their limit were ended
    process = grader._pool._process
    assert process is not None
    seconds = sum(map(processor_time, children_of(process.pid)))
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return seconds + (int(fields[13]) + int(fields[14])) / TICKS  # the children that have ended


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


HOSTILE = {
    "power tower": "9^{9^{9^{9}}}",
    "power tower in a sum": "x+9^{9^{9^{9}}}",
    "huge factorial": "100000000!",
    "huge binomial": r"\binom{10^9}{10^8}",
    "huge matrix": r"\operatorname{eye}(100000)",
    "long sum": r"\sum_{k=1}^{10^{12}}\frac{1}{k}",
    "hard integral": r"\int_0^1 x^x dx",
    "nested parentheses": "(" * 3000 + "1" + ")" * 3000,
    "nested braces": "{" * 4000 + "1" + "}" * 4000,
    "nested roots": r"\sqrt{" * 1000 + "1" + "}" * 1000,
    "many terms": "+".join(f"x^{{{i}}}" for i in range(1000)),
    "spaces": "1" + " " * 9000 + "x",
    "9,000 digits": "1" * 9000 + "x",
    "1 MB of digits": "1" * 1_000_000,
    "1 MB of text": "a" * 1_000_000,
    "NUL": "1\x00",
    "lone surrogate": "x+\ud800",
    "unbalanced": r"\frac{1}{\left(",
    "half a command": "x^",
    "division by zero": r"\frac{1}{0}",
    "nan": r"\frac{0}{0}",
}


@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_answer_keeps_to_its_limit_and_the_pool_goes_on(strict_grader: MathGrader, answer: str) -> None:
    start = processor_seconds(strict_grader)
    [verdict] = strict_grader.grade_with_reasons([rf"\boxed{{{answer}}}"], ["x+2"])
    assert processor_seconds(strict_grader) - start < LIMIT + SLACK
    assert verdict.reward == 0.0
    assert strict_grader.grade([r"\boxed{2+x}"], ["x+2"]) == [1.0]


def test_a_power_tower_costs_one_limit(strict_grader: MathGrader) -> None:
    start = processor_seconds(strict_grader)
    assert strict_grader.grade_with_reasons([TOWER], ["5"]) == [Verdict(0.0, "timeout")]
    assert LIMIT <= processor_seconds(strict_grader) - start < LIMIT + SLACK


def test_waiting_for_a_processor_does_not_count() -> None:
    """If it did, right answers would get 0 on a busy machine. Here a judge gets no processor because it is stopped."""
    with MathGrader(timeout=LIMIT, workers=1) as grader:
        assert grader.grade([r"\boxed{x+1}"], ["1+x"]) == [1.0]
        process = grader._pool._process
        assert process is not None
        [judge] = children_of(process.pid)
        verdict = grader._pool.submit("9^{9^{9^{9}}}", ["5"])
        os.kill(judge, signal.SIGSTOP)
        time.sleep(2 * LIMIT)
        assert not verdict.done()
        os.kill(judge, signal.SIGCONT)
        assert verdict.result() == "timeout"


def test_hostile_answers_do_not_spoil_their_neighbours(strict_grader: MathGrader) -> None:
    """An answer that waits behind four power towers still gets its full time."""
    towers = [rf"\boxed{{9^{{9^{{9^{{9}}}}}}+{i}}}" for i in range(4)]
    rewards = strict_grader.grade([*towers, r"\boxed{1+x}", r"\boxed{x+3}"], ["7"] * 4 + ["x+1"] * 2)
    assert rewards == [0.0] * 4 + [1.0, 0.0]


def test_equal_hostile_answers_are_judged_once(strict_grader: MathGrader) -> None:
    start = processor_seconds(strict_grader)
    assert strict_grader.grade([TOWER] * 64, ["5"] * 64) == [0.0] * 64
    assert processor_seconds(strict_grader) - start < LIMIT + SLACK


@pytest.mark.parametrize(
    "template",
    [
        "__import__('os').system('touch {}')",
        "().__class__.__base__.__subclasses__()+open('{}','w')",
        r"\text{{__import__('os').system('touch {}')}}",
        r"f_{{exec(open('{}','w'))}}(x)",
        r"\operatorname{{exec}}(open('{}','w'))",
        "1+eval(\"open('{}','w')\")",
        r"\mathrm{{open('{}','w')}}",
    ],
)
def test_nothing_is_executed(strict_grader: MathGrader, tmp_path: Path, template: str) -> None:
    mark = tmp_path / "mark"
    for gold in ("1", "x+1", template.format(mark) + "+0"):
        assert strict_grader.grade([rf"\boxed{{{template.format(mark)}}}"], [gold]) == [0.0]
    assert not mark.exists()
