"""What is in question files: `nemo-disco data` counts, measures, compares, filters and converts them.

Touches files, and a tokenizer and a grader through what the caller hands in; trains nothing.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nemo_disco.data.normalize import question_key, text_key
from nemo_disco.data.questions import Question, load_questions
from nemo_disco.data.records import read_records
from nemo_disco.data.schemas import QUESTION_FIELDS
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.files import atomic_file, write_atomically

WRITTEN = (".jsonl", ".json", ".parquet")
_SURROGATE = re.compile("[\ud800-\udfff]")
SHOWN = 5  # questions named for each finding


@dataclass
class Survey:
    """The questions of some files, and which of them have what fault.

    lengths [N]: tokens (None without a tokenizer). The rest are positions in `questions`: `repeated` are those that an
    earlier one asks already, `overlapping` are asked by an evaluation file, `unread` have an answer that the grader
    cannot compute with, `decided` are always right or always wrong in earlier rollouts; pass_rates: where measured.
    """

    questions: Sequence[Question]
    notes: list[str] = field(default_factory=list)
    lengths: list[int] | None = None
    repeated: dict[int, int] = field(default_factory=dict)
    conflicting: list[int] = field(default_factory=list)
    overlapping: dict[int, Question] = field(default_factory=dict)
    unread: dict[int, str] = field(default_factory=dict)
    pass_rates: dict[int, float] = field(default_factory=dict)

    @property
    def decided(self) -> list[int]:
        return [i for i, rate in self.pass_rates.items() if rate in (0.0, 1.0)]

    def longer_than(self, tokens: int) -> list[int]:
        return [i for i, length in enumerate(self.lengths or []) if length > tokens]


def survey(
    files: Sequence[Path],
    *,
    against: Sequence[Path] = (),
    rollouts: Sequence[Path] = (),
    count_tokens: Callable[[Sequence[Question]], list[int]] | None = None,
    unread: Callable[[Sequence[str]], list[str]] | None = None,
) -> Survey:
    """Look at every question of `files`.

    against: evaluation files. rollouts: JSON lines with `question` and `correct`, as runs write them.
    count_tokens: questions -> tokens. unread: answers -> what the grader cannot do with each, or "".
    Malformed records are left out and noted, however many they are. Raises UserError as load_questions does, and naming
    the line of a rollout that is none.
    """
    loaded = load_questions(files, max_bad_records=1.0)  # what is wrong is what is looked for
    found = Survey(loaded.questions, list(loaded.notes))
    keys = [question_key(q) for q in found.questions]
    first: dict[str, int] = {}
    for i, key in enumerate(keys):
        if first.setdefault(key, i) != i:
            found.repeated[i] = first[key]
            if set(found.questions[i].answers) != set(found.questions[first[key]].answers):
                found.conflicting.append(i)
    held_out: dict[str, Question] = {}
    for path in against:
        other = load_questions([path], max_bad_records=1.0)
        held_out |= {question_key(q): q for q in other.questions}
        found.notes += other.notes
    found.overlapping = {i: held_out[key] for i, key in enumerate(keys) if key in held_out}
    if count_tokens is not None:
        found.lengths = count_tokens(found.questions)
    if unread is not None:
        flat = [(i, answer) for i, q in enumerate(found.questions) for answer in q.answers]
        for (i, _), reason in zip(flat, unread([answer for _, answer in flat]), strict=True):
            if reason:
                found.unread.setdefault(i, reason)
    if rollouts:
        rates = pass_rates(rollouts)
        found.pass_rates = {i: rates[key] for i, key in enumerate(keys) if key in rates}
    return found


def pass_rates(files: Iterable[Path]) -> dict[str, float]:
    """The share of right responses of each question, by its key, over all files together."""
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for path in files:
        for place, line, _ in read_records(path):
            question, correct = line.get("question"), line.get("correct")
            if not isinstance(question, str) or not isinstance(correct, bool | int):
                raise UserError(f"{path}, {place}: a rollout has `question`, a text, and `correct`, true or false")
            verdicts[text_key(question)].append(bool(correct))
    return {key: sum(of) / len(of) for key, of in verdicts.items()}


def describe(found: Survey) -> str:
    """The survey in words."""
    total = len(found.questions)
    lines = [f"{total:,} questions", *found.notes]
    if found.lengths:
        low, middle, high, most = np.percentile(found.lengths, [0, 50, 95, 100])
        lines.append(f"prompt tokens: min {low:.0f}, median {middle:.0f}, 95% up to {high:.0f}, max {most:.0f}")
    lines.append(
        _line("asked before", total, [f"{_at(found, i)} = {_at(found, j)}" for i, j in found.repeated.items()])
    )
    if found.conflicting:
        lines.append(_line("asked before with another answer", total, [_at(found, i) for i in found.conflicting]))
    overlaps = [f"{_at(found, i)} = {question.source}" for i, question in found.overlapping.items()]
    lines.append(_line("also in an evaluation file", total, overlaps))
    unread = [f"{_at(found, i)} ({reason}): {found.questions[i].answers[0]:.60}" for i, reason in found.unread.items()]
    lines.append(_line("with an answer that is compared as text only", total, unread))
    if found.pass_rates:
        rates = np.array(list(found.pass_rates.values()))
        lines.append(
            f"pass rate, of {len(rates):,} measured: mean {rates.mean():.3f}; always wrong {np.sum(rates == 0):,}, "
            f"always right {np.sum(rates == 1):,}"
        )
    return "\n".join(lines)


def keep(found: Survey, drop: Iterable[str], max_tokens: int | None) -> tuple[list[Question], list[str]]:
    """The questions without those that have a fault named in `drop` (duplicates, contaminated, unparsable), are longer
    than max_tokens, or always came out the same; and a line for each reason."""
    out = {
        "duplicates": set(found.repeated) if "duplicates" in drop else set(),
        "contaminated": set(found.overlapping) if "contaminated" in drop else set(),
        "unparsable": set(found.unread) if "unparsable" in drop else set(),
        f"over {max_tokens} tokens": set(found.longer_than(max_tokens)) if max_tokens else set(),
        "always right or always wrong": set(found.decided),
    }
    dropped = set().union(*out.values())
    kept = [q for i, q in enumerate(found.questions) if i not in dropped]
    return kept, [f"left out, {why}: {len(which):,}" for why, which in out.items() if which]


def write_questions(path: Path, questions: Sequence[Question]) -> None:
    """As JSONL, JSON or Parquet, by the name's ending; load_questions reads the same questions from it.

    Raises UserError for another ending, for no questions, and where it cannot be written.
    """
    if path.suffix not in WRITTEN:
        raise UserError(f"--out {path}: name it {', '.join(WRITTEN)}")
    if not questions:
        raise UserError(f"--out {path}: no question is left; lift a filter")
    records = [_record(q) for q in questions]
    if path.suffix == ".parquet":
        _write_parquet(path, records)
    else:
        lines = [_dumped(path, record) for record in records]
        joined = "[\n" + ",\n".join(lines) + "\n]\n" if path.suffix == ".json" else "\n".join(lines) + "\n"
        write_atomically(path, joined)


def _write_parquet(path: Path, records: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = dict.fromkeys(name for record in records for name in record)
    # One type a column: alternatives and metadata of mixed types are told apart by nothing in Parquet.
    columns = {name: [record.get(name) for record in records] for name in names}
    for name, values in columns.items():
        if name == "answer" and any(isinstance(v, list) for v in values):
            columns[name] = [v if isinstance(v, list) else [v] for v in values]
        elif name not in ("problem", "messages", "answer"):
            columns[name] = [None if v is None else _dumped(path, v) for v in values]
    try:
        table = pa.table(columns)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--out {path}: Parquet cannot hold these records ({reason}); name it .jsonl") from error
    with atomic_file(path) as work:
        pq.write_table(table, work)


def _dumped(path: Path, value: Any) -> str:
    """As JSON text; with escapes where it holds half of a surrogate pair, which no file can hold otherwise."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
        return text if text.isascii() or not _SURROGATE.search(text) else json.dumps(value, default=str)
    except RecursionError as error:
        raise UserError(f"--out {path}: a record is nested too deeply to be written; leave it out") from error


def _record(question: Question) -> dict[str, Any]:
    asked = {"problem": question.text} if isinstance(question.text, str) else {"messages": _turns(question)}
    answers = question.answers[0] if len(question.answers) == 1 else list(question.answers)
    rest = {k: v for k, v in question.metadata.items() if k not in QUESTION_FIELDS}
    return asked | {"answer": answers} | rest


def _turns(question: Question) -> list[dict[str, Any]]:
    return [turn.as_dict() for turn in question.messages]


def _at(found: Survey, i: int) -> str:
    return found.questions[i].source


def _line(what: str, total: int, names: list[str]) -> str:
    more = [f"and {len(names) - SHOWN:,} more"] if len(names) > SHOWN else []
    return "\n  ".join([f"{what}: {len(names):,} of {total:,}", *names[:SHOWN], *more])
