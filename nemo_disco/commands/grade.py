"""`nemo-disco grade`: the reward and the reason of each response in a JSONL file."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from nemo_disco.data.question_fields import answer_text, final_answer, lacks_final_answer
from nemo_disco.data.record_files import kind_of, read_lines
from nemo_disco.rewards.math.grader import MathGrader
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.files import atomic_file

log = logging.getLogger(__name__)
BATCH = 512  # lines graded together


def main(options: argparse.Namespace) -> int:
    """Grade options.file to the screen, or to options.out, which appears only when all is graded."""
    settings = {"timeout": options.timeout, "workers": options.workers, "require_think": options.require_think}
    if options.out is None:
        grade_file(options.file, sys.stdout, **settings)
        return 0
    with atomic_file(options.out) as work, work.open("w", encoding="utf-8") as out:
        grade_file(options.file, out, **settings)
    return 0


def grade_file(
    path: str | Path, out: TextIO, *, timeout: float = 5.0, workers: int = 2, require_think: bool = False
) -> None:
    """Write one JSON line, `{"reward": ..., "reason": ...}`, to `out` for each line of the file, in order.

    A line has `response`, a string, and `answer`: a string or a number, or a list of alternatives. Of an answer that is
    a whole solution in GSM8K's form, what follows `####` is taken, as from a question file; a warning says so.
    Raises UserError naming the line and the field, before anything is graded. Blank lines are skipped.
    """
    solutions = 0
    for _, gold in _lines(path):  # all lines are checked before time is spent on the first
        solutions += any(final_answer(answer) != answer for answer in gold)
    if solutions:
        log.warning("%s: %d answers are whole solutions: what follows #### is the answer", path, solutions)
    lines = ((response, [final_answer(answer) for answer in answers]) for response, answers in _lines(path))
    with MathGrader(timeout=timeout, workers=workers, require_think=require_think) as grader:
        while batch := list(islice(lines, BATCH)):
            responses, answers = zip(*batch, strict=True)
            for verdict in grader.grade_with_reasons(responses, answers):
                out.write(json.dumps({"reward": verdict.reward, "reason": verdict.reason}) + "\n")
            out.flush()


def _lines(path: str | Path) -> Iterator[tuple[str, list[str]]]:
    for place, record, fault in read_lines(Path(path)):
        if fault is not None:
            raise UserError(f"{fault}; each line is an object with `response` and `answer`") from fault
        where = f"{path}, {place}"
        for field in ("response", "answer"):
            if field not in record:
                raise UserError(f"{where}: the field `{field}` is missing")
        if not isinstance(record["response"], str):
            raise UserError(f"{where}: `response` must be a string, not {kind_of(record['response'])}")
        yield record["response"], _alternatives(record["answer"], where)


def _alternatives(answer: Any, where: str) -> list[str]:
    """The gold answers as strings, as a question file's are."""
    values = answer if isinstance(answer, list) else [answer]
    if not values:
        raise UserError(f"{where}: `answer` is an empty list; give at least one answer")
    answers = [answer_text(where, "answer", value) for value in values]
    if "" in answers:
        raise UserError(f"{where}: `answer` is {'null' if None in values else 'empty'}; give a string or a number")
    if any(map(lacks_final_answer, answers)):
        raise UserError(f"{where}: `answer` ends in `####`, and no answer follows it")
    return answers
