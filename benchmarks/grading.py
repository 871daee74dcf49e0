"""The grader against itself, against the clock, and against plain math-verify. No GPU, two processes.

    python benchmarks/grading.py --data DIR --output benchmarks/results/grading.json

DIR holds the papers' sets (test/*.json, train/*.json); what is reported of them are places and reasons, not texts.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "tests" / "rewards")]

from answer_table import DIFFERENT, EQUAL  # noqa: E402 - a script's neighbours, not packages
from common import write_record  # noqa: E402
from grading_forms import changed, rewritten  # noqa: E402
from grading_reasons import reason_of  # noqa: E402

from nemo_disco.data.questions import Question, load_questions  # noqa: E402
from nemo_disco.rewards import MathGrader  # noqa: E402

Case = tuple[str, str]  # answer, gold


def box(answer: str) -> str:
    return rf"Let us see.</think> So the answer is \boxed{{{answer}}}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="the papers' sets, such as shared/data/deepscaler")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with MathGrader(timeout=10.0, workers=2) as grader:
        record: dict[str, Any] = {"speed": speed(grader), "table": against_math_verify(grader, table())}
        if options.data:
            files = sorted(options.data.glob("t*/*.json"))
            record["sets"] = {f"{file.parent.name}/{file.stem}": of_set(grader, file) for file in files}
            record["golds_against_math_verify"] = against_math_verify(grader, gold_cases(files), hide=True)
    write_record(options.output, record)


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


def table() -> list[tuple[Case, bool]]:
    return [((a, gold), True) for gold, answers in EQUAL for a in answers] + [
        ((a, gold), False) for gold, answers in DIFFERENT for a in answers
    ]


def gold_cases(files: Sequence[Path]) -> list[tuple[Case, bool]]:
    """Of each set's distinct gold answers: itself, its equivalent forms, and one change."""
    golds = sorted({q.answers[0] for file in files for q in load_questions([file]).questions})
    rng = random.Random(1)
    cases = [((form, gold), True) for gold in golds for form in (gold, *rewritten(gold).values())]
    return cases + [((changed(gold, rng), gold), False) for gold in golds]


def against_math_verify(grader: MathGrader, cases: list[tuple[Case, bool]], hide: bool = False) -> dict[str, Any]:
    """Both graders on the same cases: how often they agree, and every disagreement with its reason."""
    answers, golds = [box(answer) for (answer, _), _ in cases], [gold for (_, gold), _ in cases]
    ours = [reward == 1.0 for reward in grader.grade(answers, golds)]
    theirs = math_verify(list(zip(answers, golds, strict=True)))
    rows = [
        {
            "gold": gold,
            "answer": answer,
            "right": right,
            "ours": we,
            "math_verify": they,
            "why": reason_of(answer, gold),
        }
        for ((answer, gold), right), we, they in zip(cases, ours, theirs, strict=True)
        if we != they
    ]
    result: dict[str, Any] = {
        "cases": len(cases),
        "agree": sum(we == they for we, they in zip(ours, theirs, strict=True)),
        "ours_right": sum(we == right for (_, right), we in zip(cases, ours, strict=True)),
        "math_verify_right": sum(they == right for (_, right), they in zip(cases, theirs, strict=True)),
        "disagreements_by_reason": dict(Counter(f"{row['why']} ({verdict(row)})" for row in rows).most_common()),
    }
    return result if hide else result | {"disagreements": rows}


def verdict(row: dict[str, Any]) -> str:
    return "ours is right" if row["ours"] == row["right"] else "math-verify is right"


def math_verify(cases: list[Case]) -> list[bool]:
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
