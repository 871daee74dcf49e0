"""Accuracy and speed of the math grader on known cases, and its disagreements with plain math-verify.

    python benchmarks/grading.py --data DIR --output benchmarks/results/grading.json

One command measures everything, in some minutes, in two grading processes without a GPU. DIR holds the papers' sets of
questions (test/*.json, train/*.json). Exceptions in these sets are reported by their place in the files and by the
reason, without the text.
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

from answer_forms import change_digit, list_forms  # noqa: E402 - in the directories added above, not in packages
from answer_table import DIFFERENT, EQUAL  # noqa: E402
from common import write_record  # noqa: E402
from fault_table import KINDS  # noqa: E402
from fault_table_more import MORE_KINDS  # noqa: E402
from grading_reasons import explain_disagreement  # noqa: E402

from nemo_disco.data.questions import Question, load_questions  # noqa: E402
from nemo_disco.rewards import MathGrader  # noqa: E402
from nemo_disco.rewards.math.canonical import canonicalize  # noqa: E402
from nemo_disco.rewards.math.fast_path import decide, parse_numeral  # noqa: E402
from nemo_disco.rewards.math.units import split_unit  # noqa: E402


@dataclass(frozen=True)
class Case:
    """An answer to grade against a gold answer, with the verdict that it should get."""

    answer: str
    gold: str
    right: bool
    place: str  # where the case comes from, for people


def make_response(answer: str) -> str:
    """A response that ends with the answer in a box."""
    return rf"Let us see.</think> So the answer is \boxed{{{answer}}}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="directory of the papers' sets, such as shared/data/deepscaler"
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    files = sorted(options.data.glob("t*/*.json"))
    if not files:
        parser.error(f"no files test/*.json or train/*.json in {options.data}: give their directory as --data")
    record: dict[str, Any] = {"seconds": {}}
    with MathGrader(timeout=10.0, workers=2) as grader:
        parts: dict[str, Callable[[], Any]] = {
            "speed": lambda: measure_speed(grader),
            "speed_of_math_verify": compare_speed_with_math_verify,
            "table": lambda: compare_with_math_verify(grader, list_table_cases()),
            "cross_pairs": lambda: grade_cross_pairs(grader, files),
            "sets": lambda: {f"{file.parent.name}/{file.stem}": grade_set(grader, file) for file in files},
            "golds_against_math_verify": lambda: compare_with_math_verify(
                grader, make_gold_cases(files), hide_texts=True
            ),
        }
        for name, measure in parts.items():
            began = time.perf_counter()
            record[name] = measure()
            record["seconds"][name] = time.perf_counter() - began
            print(f"{name} took {record['seconds'][name]:.0f} s", file=sys.stderr, flush=True)
    write_record(options.output, record)


def measure_speed(grader: MathGrader, count: int = 20_000) -> dict[str, float]:
    """Speed of the grader in its two processes on integers, half of them right, in answers per wall-clock second."""
    rng = random.Random(0)
    golds = [str(rng.randrange(10_000)) for _ in range(count)]
    responses = ["So it goes on. " * 200 + make_response(gold if i % 2 else gold + "1") for i, gold in enumerate(golds)]
    began = time.perf_counter()
    rewards = grader.grade(responses, golds)
    seconds = time.perf_counter() - began
    assert sum(rewards) == count / 2
    return {"answers": count, "seconds": seconds, "answers_per_second": count / seconds}


def compare_speed_with_math_verify(count: int = 300) -> dict[str, float]:
    """Speed of both graders on integers and fractions, half of them right, in answers per processor second.

    Both run in this process; of our grader only the fast path, `decide`. times: our speed divided by math-verify's.
    """
    rng = random.Random(0)
    cases = [(str(n), str(n + i % 2)) for i in range(count) for n in [rng.randrange(10_000)]]
    cases += [(rf"\frac{{{n}}}{{{7 * n + 1}}}", f"{n + i % 2}/{7 * n + 1}") for i in range(count) for n in [i + 2]]
    rates = []
    for compare in (decide, lambda answer, gold: _is_right_by_math_verify(make_response(answer), gold)):
        began = time.process_time()
        right = sum(bool(compare(answer, gold)) for answer, gold in cases)
        rates.append(len(cases) / (time.process_time() - began))
        assert right == count, right
    return {"answers": len(cases), "ours": rates[0], "math_verify": rates[1], "times": rates[0] / rates[1]}


def grade_cross_pairs(grader: MathGrader, files: Sequence[Path]) -> dict[str, Any]:
    """Grade gold answers against other gold answers that are spelled most alike, in both directions.

    Pairs are neighbours in alphabetical order, and in the order of length and reversed spelling. Numerals are left out,
    since the grader compares them exactly. right: the places of the pairs that get the reward. A person has looked at
    the pairs of the saved record: they are equal in mathematics, such as 1/2 and \\frac{1}{2}.
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
    rewards = grader.grade([make_response(answer) for answer, _ in pairs], [gold for _, gold in pairs])
    right = sorted({f"{places[a]} / {places[g]}" for (a, g), reward in zip(pairs, rewards, strict=True) if reward})
    return {"golds": len(golds), "pairs": len(set(pairs)), "right": right}


def grade_set(grader: MathGrader, file: Path) -> dict[str, Any]:
    """Grade the first gold answer of every question of a set as it is, in each equivalent form, and changed.

    Returns for each form the number of cases, the share with the right verdict, and the place and reason of the others.
    """
    questions = load_questions([file]).questions
    rng = random.Random(0)
    forms: dict[str, list[tuple[Question, str, str]]] = {
        "itself": [(q, a, a) for q in questions for a in q.answers[:1]]
    }
    for question in questions:
        gold = question.answers[0]
        for name, form in list_forms(gold).items():
            forms.setdefault(name, []).append((question, form, gold))
        forms.setdefault("changed", []).append((question, change_digit(gold, rng), gold))
    result = {"problems": len(questions)}
    for name, cases in forms.items():
        responses, golds = [make_response(answer) for _, answer, _ in cases], [gold for *_, gold in cases]
        verdicts = grader.grade_with_reasons(responses, golds)
        right_reward = 0.0 if name == "changed" else 1.0
        exceptions = [
            f"{q.source.rpartition(', ')[2]}: {v.reason}"
            for (q, *_), v in zip(cases, verdicts, strict=True)
            if v.reward != right_reward
        ]
        right = len(cases) - len(exceptions)
        result[name] = {"cases": len(cases), "share": right / len(cases), "exceptions": exceptions}
    return result


def list_table_cases() -> list[Case]:
    """All cases of the tests' tables of answers: equivalent, different, and by kind of fault."""
    equal = [Case(a, gold, True, "equal") for gold, answers in EQUAL for a in answers]
    different = [Case(a, gold, False, "different") for gold, answers in DIFFERENT for a in answers]
    faults = [
        Case(answer, gold, right, kind)
        for kind, right_and_wrong in (KINDS | MORE_KINDS).items()
        for pairs, right in zip(right_and_wrong, (True, False), strict=True)
        for answer, gold in pairs
    ]
    return equal + different + faults


def make_gold_cases(files: Sequence[Path]) -> list[Case]:
    """Cases from every fifth distinct gold answer of the sets: itself, its equivalent forms, and a changed form."""
    places: dict[str, str] = {}  # gold answer -> the place where it first occurs
    for file in files:
        for question in load_questions([file]).questions:
            place = f"{file.parent.name}/{file.stem}, {question.source.rpartition(', ')[2]}"
            places.setdefault(question.answers[0], place)
    rng = random.Random(1)
    cases = []
    for gold, place in sorted(places.items())[::5]:
        forms = {"itself": gold, **list_forms(gold)}
        cases += [Case(form, gold, True, f"{place}, {name}") for name, form in forms.items()]
        cases.append(Case(change_digit(gold, rng), gold, False, f"{place}, changed"))
    return cases


def compare_with_math_verify(grader: MathGrader, cases: list[Case], hide_texts: bool = False) -> dict[str, Any]:
    """Grade the cases with both graders: how many verdicts agree, how many are right, and all disagreements by reason.

    hide_texts: list disagreements by the place of the case, without its texts.
    """
    responses, golds = [make_response(case.answer) for case in cases], [case.gold for case in cases]
    grader_verdicts = [reward == 1.0 for reward in grader.grade(responses, golds)]
    math_verify_verdicts = grade_with_math_verify(list(zip(responses, golds, strict=True)))
    by_reason: dict[str, list[str]] = defaultdict(list)
    agree = grader_right = math_verify_right = 0
    for case, verdict, other in zip(cases, grader_verdicts, math_verify_verdicts, strict=True):
        agree += verdict == other
        grader_right += verdict == case.right
        math_verify_right += other == case.right
        if verdict != other:
            winner = "ours is right" if verdict == case.right else "math-verify is right"
            text = case.place if hide_texts else f"{case.answer} for {case.gold}"
            by_reason[f"{explain_disagreement(case.answer, case.gold)} ({winner})"].append(text)
    return {
        "cases": len(cases),
        "agree": agree,
        "ours_right": grader_right,
        "math_verify_right": math_verify_right,
        "disagreements": dict(sorted(by_reason.items(), key=lambda entry: -len(entry[1]))),
    }


def grade_with_math_verify(cases: list[tuple[str, str]]) -> list[bool]:
    """Verdicts of math-verify with its defaults, used as its documentation shows, on (response, gold answer) pairs.

    They are computed in a child process, since math-verify's time limit works in a main thread only.
    """
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=2000) as pool:
        return pool.starmap(_is_right_by_math_verify, cases, chunksize=50)


def _is_right_by_math_verify(response: str, gold: str) -> bool:
    import logging

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    try:
        return bool(verify(parse(f"${gold}$"), parse(response)))
    except Exception:  # math-verify fails on some texts, which then count as wrong
        return False


if __name__ == "__main__":
    main()
