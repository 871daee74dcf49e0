"""The grader against itself, against the clock, and against plain math-verify. No GPU, two processes.

    python benchmarks/grading.py --data DIR --output benchmarks/results/grading.json

One run measures all, in some minutes. DIR holds the papers' sets (test/*.json, train/*.json); what is reported of them
are places and reasons, not texts.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "tests" / "rewards" / "math")]

from answer_forms import changed, rewritten  # noqa: E402 - a script's neighbours, not packages
from answer_table import DIFFERENT, EQUAL  # noqa: E402
from common import write_record  # noqa: E402
from fault_table import KINDS  # noqa: E402
from fault_table_more import MORE_KINDS  # noqa: E402
from grading_reasons import reason_of  # noqa: E402

from nemo_disco.data.questions import Question, load_questions  # noqa: E402
from nemo_disco.rewards import MathGrader  # noqa: E402
from nemo_disco.rewards.math.canonical import canonicalize  # noqa: E402
from nemo_disco.rewards.math.fast_path import decide, parse_numeral  # noqa: E402
from nemo_disco.rewards.math.units import split_unit  # noqa: E402


@dataclass(frozen=True)
class Case:
    """An answer to be graded against a gold answer, whether it is right, and where the two come from."""

    answer: str
    gold: str
    right: bool
    place: str


def box(answer: str) -> str:
    return rf"Let us see.</think> So the answer is \boxed{{{answer}}}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the papers' sets, such as shared/data/deepscaler")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    files = sorted(options.data.glob("t*/*.json"))
    if not files:
        parser.error(f"--data {options.data} has no test/*.json and no train/*.json")
    measured: dict[str, Any] = {"seconds": {}}
    with MathGrader(timeout=10.0, workers=2) as grader:
        parts: dict[str, Callable[[], Any]] = {
            "speed": lambda: speed(grader),
            "speed_of_math_verify": speed_of_math_verify,
            "table": lambda: against_math_verify(grader, table()),
            "cross_pairs": lambda: cross_pairs(grader, files),
            "sets": lambda: {f"{file.parent.name}/{file.stem}": of_set(grader, file) for file in files},
            "golds_against_math_verify": lambda: against_math_verify(grader, gold_cases(files), hide=True),
        }
        for name, measure in parts.items():
            began = time.perf_counter()
            measured[name] = measure()
            measured["seconds"][name] = time.perf_counter() - began
            print(f"{name}: {measured['seconds'][name]:.0f} s", file=sys.stderr, flush=True)
    write_record(options.output, measured)


def speed(grader: MathGrader, count: int = 20_000) -> dict[str, float]:
    """Plain numeric answers a second, in the two processes that training has: half right, half wrong."""
    rng = random.Random(0)
    golds = [str(rng.randrange(10_000)) for _ in range(count)]
    responses = ["So it goes on. " * 200 + box(gold if i % 2 else gold + "1") for i, gold in enumerate(golds)]
    began = time.perf_counter()
    rewards = grader.grade(responses, golds)
    seconds = time.perf_counter() - began
    assert sum(rewards) == count / 2
    return {"answers": count, "seconds": seconds, "answers_per_second": count / seconds}


def speed_of_math_verify(count: int = 300) -> dict[str, float]:
    """Integers and fractions, half right and half wrong: answers a second of processor time, both in this process."""
    rng = random.Random(0)
    cases = [(str(n), str(n + i % 2)) for i in range(count) for n in [rng.randrange(10_000)]]
    cases += [(rf"\frac{{{n}}}{{{7 * n + 1}}}", f"{n + i % 2}/{7 * n + 1}") for i in range(count) for n in [i + 2]]
    rates = []
    for compare in (decide, lambda answer, gold: _math_verify(box(answer), gold)):
        began = time.process_time()
        right = sum(bool(compare(answer, gold)) for answer, gold in cases)
        rates.append(len(cases) / (time.process_time() - began))
        assert right == count, right
    return {"answers": len(cases), "ours": rates[0], "math_verify": rates[1], "times": rates[0] / rates[1]}


def cross_pairs(grader: MathGrader, files: Sequence[Path]) -> dict[str, Any]:
    """Different gold answers, the most alike in spelling, graded for one another in both directions.

    Numerals are left out: they are compared exactly. right: pairs that earn, by place. A person has looked at these:
    they are the same in mathematics, such as 1/2 and \\frac{1}{2}.
    """
    places: dict[str, str] = {}
    for file in files:
        for question in load_questions([file]).questions:
            place = f"{file.parent.name}/{file.stem}, {question.source.rpartition(', ')[2]}"
            places.setdefault(canonicalize(question.answers[0]), place)
    golds = sorted(gold for gold in places if parse_numeral(split_unit(gold).body) is None)
    pairs = [(one, other) for one, other in pairwise(golds)]
    pairs += [(one, other) for one, other in pairwise(sorted(golds, key=lambda gold: (len(gold), gold[::-1])))]
    pairs += [(other, one) for one, other in pairs]
    rewards = grader.grade([box(answer) for answer, _ in pairs], [gold for _, gold in pairs])
    right = sorted({f"{places[a]} / {places[g]}" for (a, g), reward in zip(pairs, rewards, strict=True) if reward})
    return {"golds": len(golds), "pairs": len(set(pairs)), "right": right}


def of_set(grader: MathGrader, file: Path) -> dict[str, Any]:
    """Every gold answer of a set graded as it is, in each equivalent form, and changed; the exceptions by place."""
    questions = load_questions([file]).questions
    rng = random.Random(0)
    forms: dict[str, list[tuple[Question, str, str]]] = {
        "itself": [(q, a, a) for q in questions for a in q.answers[:1]]
    }
    for question in questions:
        gold = question.answers[0]
        for name, form in rewritten(gold).items():
            forms.setdefault(name, []).append((question, form, gold))
        forms.setdefault("changed", []).append((question, changed(gold, rng), gold))
    result = {"problems": len(questions)}
    for name, cases in forms.items():
        verdicts = grader.grade_with_reasons([box(answer) for _, answer, _ in cases], [gold for *_, gold in cases])
        wanted = 0.0 if name == "changed" else 1.0
        exceptions = [
            f"{q.source.rpartition(', ')[2]}: {v.reason}"
            for (q, *_), v in zip(cases, verdicts, strict=True)
            if v.reward != wanted
        ]
        right = len(cases) - len(exceptions)
        result[name] = {"cases": len(cases), "share": right / len(cases), "exceptions": exceptions}
    return result


def table() -> list[Case]:
    equal = [Case(a, gold, True, "equal") for gold, answers in EQUAL for a in answers]
    different = [Case(a, gold, False, "different") for gold, answers in DIFFERENT for a in answers]
    faults = [
        Case(answer, gold, right, kind)
        for kind, sides in (KINDS | MORE_KINDS).items()
        for pairs, right in zip(sides, (True, False), strict=True)
        for answer, gold in pairs
    ]
    return equal + different + faults


def gold_cases(files: Sequence[Path]) -> list[Case]:
    """Of every fifth of the sets' distinct gold answers: itself, its equivalent forms, and one change."""
    first: dict[str, str] = {}  # where it stands
    for file in files:
        for question in load_questions([file]).questions:
            place = f"{file.parent.name}/{file.stem}, {question.source.rpartition(', ')[2]}"
            first.setdefault(question.answers[0], place)
    rng = random.Random(1)
    cases = []
    for gold, place in sorted(first.items())[::5]:
        forms = {"itself": gold, **rewritten(gold)}
        cases += [Case(form, gold, True, f"{place}, {name}") for name, form in forms.items()]
        cases.append(Case(changed(gold, rng), gold, False, f"{place}, changed"))
    return cases


def against_math_verify(grader: MathGrader, cases: list[Case], hide: bool = False) -> dict[str, Any]:
    """Both graders on the same cases: how often they agree, and every disagreement by reason; hide: places alone."""
    answers, golds = [box(case.answer) for case in cases], [case.gold for case in cases]
    ours = [reward == 1.0 for reward in grader.grade(answers, golds)]
    theirs = math_verify(list(zip(answers, golds, strict=True)))
    by_reason: dict[str, list[str]] = defaultdict(list)
    for case, we, they in zip(cases, ours, theirs, strict=True):
        if we != they:
            who = "ours is right" if we == case.right else "math-verify is right"
            shown = case.place if hide else f"{case.answer} for {case.gold}"
            by_reason[f"{reason_of(case.answer, case.gold)} ({who})"].append(shown)
    return {
        "cases": len(cases),
        "agree": sum(we == they for we, they in zip(ours, theirs, strict=True)),
        "ours_right": sum(we == case.right for case, we in zip(cases, ours, strict=True)),
        "math_verify_right": sum(they == case.right for case, they in zip(cases, theirs, strict=True)),
        "disagreements": dict(sorted(by_reason.items(), key=lambda entry: -len(entry[1]))),
    }


def math_verify(cases: list[tuple[str, str]]) -> list[bool]:
    """math-verify with its defaults, as its documentation shows it. Its own time limit needs a main thread."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=2000) as pool:
        return pool.starmap(_math_verify, cases, chunksize=50)


def _math_verify(answer: str, gold: str) -> bool:
    import logging

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    try:
        return bool(verify(parse(f"${gold}$"), parse(answer)))
    except Exception:  # what it makes of a text that it cannot take: no reward
        return False


if __name__ == "__main__":
    main()
