"""No answer may take longer than its limit, end the pool, or run code. Each case here has stopped some grader."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_disco.rewards import MathGrader, Verdict

LIMIT = 1.0  # seconds
SLACK = 0.5
TOWER = r"\boxed{9^{9^{9^{9}}}}"


@pytest.fixture(scope="module")
def strict() -> Iterator[MathGrader]:
    with MathGrader(timeout=LIMIT, workers=2) as grader:
        grader.grade([r"\boxed{x+1}"], ["1+x"])  # starting up is not part of any answer's time
        yield grader


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
def test_within_the_limit_and_the_pool_goes_on(strict: MathGrader, answer: str) -> None:
    start = time.monotonic()
    [verdict] = strict.grade_with_reasons([rf"\boxed{{{answer}}}"], ["x+2"])
    assert time.monotonic() - start < LIMIT + SLACK
    assert verdict.reward == 0.0
    assert strict.grade([r"\boxed{2+x}"], ["x+2"]) == [1.0]


def test_a_power_tower_costs_one_limit(strict: MathGrader) -> None:
    start = time.monotonic()
    assert strict.grade_with_reasons([TOWER], ["5"]) == [Verdict(0.0, "timeout")]
    assert LIMIT <= time.monotonic() - start < LIMIT + SLACK


def test_hostile_answers_do_not_spoil_their_neighbours(strict: MathGrader) -> None:
    """Eight towers on two workers cost four limits, not eight, and what waits behind them has its own full time."""
    towers = [rf"\boxed{{9^{{9^{{9^{{9}}}}}}+{i}}}" for i in range(8)]
    start = time.monotonic()
    rewards = strict.grade([*towers, r"\boxed{1+x}", r"\boxed{x+3}"], ["7"] * 8 + ["x+1"] * 2)
    assert rewards == [0.0] * 8 + [1.0, 0.0]
    assert time.monotonic() - start < 8 * LIMIT


def test_equal_hostile_answers_are_judged_once(strict: MathGrader) -> None:
    start = time.monotonic()
    assert strict.grade([TOWER] * 64, ["5"] * 64) == [0.0] * 64
    assert time.monotonic() - start < LIMIT + SLACK


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
def test_nothing_is_executed(strict: MathGrader, tmp_path: Path, template: str) -> None:
    mark = tmp_path / "mark"
    for gold in ("1", "x+1", template.format(mark) + "+0"):
        assert strict.grade([rf"\boxed{{{template.format(mark)}}}"], [gold]) == [0.0]
    assert not mark.exists()
