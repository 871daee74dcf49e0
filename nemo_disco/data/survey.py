"""The work of `nemo-disco data`: count, measure, compare, filter and convert question files.

Reads and writes files; uses a tokenizer and a grader only through functions that the caller passes.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nemo_disco.data.question_fields import QUESTION_FIELDS
from nemo_disco.data.questions import Question, load_questions
from nemo_disco.data.record_files import read_records
from nemo_disco.runtime.errors import UserError, one_line
from nemo_disco.runtime.files import atomic_file, write_atomically

OUTPUT_SUFFIXES = (".jsonl", ".json", ".parquet")
_SURROGATE = re.compile("[\ud800-\udfff]")
MAX_EXAMPLES = 5  # questions named for each finding
# The instruction that some question files append to the text (verl's Parquet files do, the JSON files do not).
_INSTRUCTION = re.compile(r"\s*(?:let'?s think step by step|please reason step by step)\b[^\n]*\Z", re.IGNORECASE)
_COMMANDS = re.compile(r"\\(?:left|right|displaystyle|[dt]?frac|text|mathrm|[,;!]|\s)(?![a-zA-Z])")
_PUNCTUATION = re.compile(r"(?<!\d)\.|\.(?!\d)|[^\w<>=+*/^!.-]|_")


@dataclass
class Survey:
    """Findings about the questions of some files; a question is named by its position in `questions`.

    lengths [N]: prompt tokens (None without a tokenizer). duplicates: question -> the first one with the same text;
    conflicting: the duplicates with other answers. contaminated: question -> the same one in an evaluation file, or
    None without such files. unparsable: question -> why the grader can compare its answer as text only.
    """

    questions: Sequence[Question]
    notes: list[str] = field(default_factory=list)
    lengths: list[int] | None = None
    duplicates: dict[int, int] = field(default_factory=dict)
    conflicting: list[int] = field(default_factory=list)
    contaminated: dict[int, Question] | None = None
    unparsable: dict[int, str] = field(default_factory=dict)
    pass_rates: dict[int, float] = field(default_factory=dict)


def survey_questions(
    files: Sequence[Path],
    *,
    against: Sequence[Path] = (),
    rollouts: Sequence[Path] = (),
    count_tokens: Callable[[Sequence[Question]], list[int]] | None = None,
    find_unparsable: Callable[[Sequence[str]], list[str]] | None = None,
) -> Survey:
    """Load the questions of `files` and look for duplicates, contamination, unparsable answers and pass rates.

    against: evaluation files. rollouts: JSON lines with `question` and `correct`, as runs write them.
    count_tokens: questions -> prompt tokens. find_unparsable: answers -> why the grader cannot parse each, or "".
    Malformed records are left out and noted, however many they are. Raises UserError as load_questions does, and for a
    line of `rollouts` that is not a rollout, naming it.
    """
    loaded = load_questions(files, max_bad_records=1.0)  # a survey reports faulty files rather than refusing them
    survey = Survey(loaded.questions, list(loaded.notes))
    keys = [text_key(q.user_text) for q in survey.questions]
    first: dict[str, int] = {}
    for i, key in enumerate(keys):
        if first.setdefault(key, i) != i:
            survey.duplicates[i] = first[key]
            if set(survey.questions[i].answers) != set(survey.questions[first[key]].answers):
                survey.conflicting.append(i)
    held_out: dict[str, Question] = {}
    for path in against:
        other = load_questions([path], max_bad_records=1.0)
        held_out |= {text_key(q.user_text): q for q in other.questions}
        survey.notes += other.notes
    survey.contaminated = {i: held_out[key] for i, key in enumerate(keys) if key in held_out} if against else None
    if count_tokens is not None:
        survey.lengths = count_tokens(survey.questions)
    if find_unparsable is not None:
        flat = [(i, answer) for i, q in enumerate(survey.questions) for answer in q.answers]
        for (i, _), reason in zip(flat, find_unparsable([answer for _, answer in flat]), strict=True):
            if reason:
                survey.unparsable.setdefault(i, reason)
    if rollouts:
        rates = pass_rates(rollouts)
        survey.pass_rates = {i: rates[key] for i, key in enumerate(keys) if key in rates}
        survey.notes += [] if survey.pass_rates else [f"none of the {len(rates):,} questions in the rollouts is here"]
    return survey


def text_key(text: str) -> str:
    """The key by which a question is found in two files: its text without case, spaces, punctuation, LaTeX sizing
    commands and a trailing instruction to think."""
    plain = unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-")
    return _PUNCTUATION.sub("", _COMMANDS.sub("", _INSTRUCTION.sub("", plain))).casefold()


def pass_rates(files: Iterable[Path]) -> dict[str, float]:
    """Share of right responses to each question over all files of rollouts, by question key."""
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for path in files:
        for place, line, _ in read_records(path):
            question, correct = line.get("question"), line.get("correct")
            if not isinstance(question, str) or not isinstance(correct, bool | int):
                raise UserError(f"{path}, {place}: not a rollout; give `question`, text, and `correct`, true or false")
            verdicts[text_key(question)].append(bool(correct))
    return {key: sum(correct) / len(correct) for key, correct in verdicts.items()}


def describe(survey: Survey) -> str:
    """The survey as text: a line for each finding, with the first questions that it concerns."""
    questions, total = survey.questions, len(survey.questions)
    lines = [f"{total:,} questions", *survey.notes]
    if survey.lengths:
        low, middle, high, most = np.percentile(survey.lengths, [0, 50, 95, 100])
        lines.append(f"prompt tokens: min {low:.0f}, median {middle:.0f}, 95% up to {high:.0f}, max {most:.0f}")
    duplicates = [f"{questions[i].source} = {questions[j].source}" for i, j in survey.duplicates.items()]
    lines.append(_finding("duplicates (repeating an earlier question)", total, duplicates))
    if survey.conflicting:
        conflicts = [questions[i].source for i in survey.conflicting]
        lines.append(_finding("duplicates with another answer", total, conflicts))
    if survey.contaminated is not None:
        contaminated = [f"{questions[i].source} = {other.source}" for i, other in survey.contaminated.items()]
        lines.append(_finding("contaminated (also in an evaluation file)", total, contaminated))
    faults = [(questions[i], reason) for i, reason in survey.unparsable.items()]
    unparsable = [f"{question.source} ({reason}): {question.answers[0]:.60}" for question, reason in faults]
    lines.append(_finding("unparsable answers (compared as text only)", total, unparsable))
    if survey.pass_rates:
        rates = np.array(list(survey.pass_rates.values()))
        lines.append(
            f"pass rate, of {len(rates):,} measured: mean {rates.mean():.3f}; always wrong {np.sum(rates == 0):,}, "
            f"always right {np.sum(rates == 1):,}"
        )
    return "\n".join(lines)


def filter_questions(survey: Survey, drop: Iterable[str], max_tokens: int | None) -> tuple[list[Question], list[str]]:
    """The questions that remain, and a line for each reason with the number of questions that it removed.

    Removed are those with a fault named in `drop` (duplicates, contaminated, unparsable), with prompts over max_tokens,
    and those that earlier rollouts always, or never, answered right: their groups have no contrast.
    """
    removed: dict[str, set[int]] = {fault: set(getattr(survey, fault) or ()) for fault in drop}
    too_long = {i for i, length in enumerate(survey.lengths or []) if max_tokens and length > max_tokens}
    removed[f"over {max_tokens} tokens"] = too_long
    removed["always right or always wrong"] = {i for i, rate in survey.pass_rates.items() if rate in (0.0, 1.0)}
    any_reason: set[int] = set().union(*removed.values())
    remaining = [q for i, q in enumerate(survey.questions) if i not in any_reason]
    return remaining, [f"left out, {why}: {len(indices):,}" for why, indices in removed.items() if indices]


def write_questions(path: Path, questions: Sequence[Question]) -> None:
    """Write JSONL, JSON or Parquet, by the suffix of `path`; load_questions reads the same questions from it.

    Raises UserError for another suffix, for no questions, and where the file cannot be written.
    """
    if path.suffix not in OUTPUT_SUFFIXES:
        raise UserError(f"--out {path}: no such format; name it {', '.join(OUTPUT_SUFFIXES)}")
    if not questions:
        raise UserError(f"--out {path}: the filters left no question; remove one")
    records = [_record(q) for q in questions]
    if path.suffix == ".parquet":
        _write_parquet(path, records)
    else:
        lines = [_to_json(path, record) for record in records]
        text = "[\n" + ",\n".join(lines) + "\n]\n" if path.suffix == ".json" else "\n".join(lines) + "\n"
        write_atomically(path, text)


def _write_parquet(path: Path, records: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = dict.fromkeys(name for record in records for name in record)
    # A Parquet column has one type: all answers become lists where one is, and metadata becomes JSON text.
    columns = {name: [record.get(name) for record in records] for name in names}
    for name, values in columns.items():
        if name == "answer" and any(isinstance(v, list) for v in values):
            columns[name] = [v if isinstance(v, list) else [v] for v in values]
        elif name not in ("problem", "messages", "answer"):
            columns[name] = [None if v is None else _to_json(path, v) for v in values]
    try:
        table = pa.table(columns)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        reason = one_line(error, 200)
        raise UserError(f"--out {path}: Parquet cannot hold these records ({reason}); name it .jsonl") from error
    with atomic_file(path) as work:
        pq.write_table(table, work)


def _to_json(path: Path, value: Any) -> str:
    """JSON text, ASCII with escapes where the value holds half of a surrogate pair (UTF-8 cannot encode it)."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
        return text if text.isascii() or not _SURROGATE.search(text) else json.dumps(value, default=str)
    except RecursionError as error:
        raise UserError(f"--out {path}: a record is nested too deeply for JSON; remove it from its file") from error


def _record(question: Question) -> dict[str, Any]:
    messages = [turn.as_dict() for turn in question.messages]
    record: dict[str, Any] = {"problem": question.text} if isinstance(question.text, str) else {"messages": messages}
    answers = question.answers[0] if len(question.answers) == 1 else list(question.answers)
    metadata = {k: v for k, v in question.metadata.items() if k not in QUESTION_FIELDS}
    return record | {"answer": answers} | metadata


def _finding(title: str, total: int, examples: list[str]) -> str:
    more = [f"and {len(examples) - MAX_EXAMPLES:,} more"] if len(examples) > MAX_EXAMPLES else []
    return "\n  ".join([f"{title}: {len(examples):,} of {total:,}", *examples[:MAX_EXAMPLES], *more])
