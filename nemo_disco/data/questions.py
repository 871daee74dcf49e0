"""Questions with their gold answers, and their loading from files in the common schemas.

Turns records into Questions and notes those that it leaves out. Uses no tokenizer and grades nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_disco.data.question_fields import (
    ANSWER_FIELDS,
    MAX_PLAIN,
    SYSTEM_FIELDS,
    Message,
    lowercase_names,
    read_answers,
    read_question,
    split_columns,
)
from nemo_disco.data.record_files import Record, scan_records
from nemo_disco.data.template_fields import read_template_fields, unread_fields
from nemo_disco.runtime.errors import UserError

MAX_BAD_RECORDS = 0.1  # share of a file's records that may be malformed; conf/data/default.yaml has the same


@dataclass(frozen=True)
class Question:
    """A question and its gold answers.

    id: position among all records of all files, in the order given (records that were left out count too).
    text: the user's turn; or all turns, the last one a user's or a tool's, if there are more than one.
    answers: alternatives, any of which is right. source: file and record, for messages. metadata: the record's other
    fields, with those for the chat template as template_fields.read_template_fields returns them.
    weight: average number of times that an epoch asks a question of this file.
    """

    id: int
    text: str | tuple[Message, ...]
    answers: tuple[str, ...]
    source: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0

    @property
    def messages(self) -> tuple[Message, ...]:
        """The question's turns."""
        return (Message("user", self.text),) if isinstance(self.text, str) else self.text

    @property
    def user_text(self) -> str:
        """The text of the user's turns alone."""
        return "\n\n".join(turn.content for turn in self.messages if turn.role == "user")


@dataclass(frozen=True)
class LoadedQuestions:
    """Questions of files, and notes: a line for each file and reason why records were left out, answers extracted from
    solutions, or fields not read."""

    questions: tuple[Question, ...]
    notes: tuple[str, ...]


def load_questions(
    paths: Sequence[str | Path], weights: Sequence[float] | None = None, max_bad_records: float = MAX_BAD_RECORDS
) -> LoadedQuestions:
    """The questions of all files, in order; records that are malformed or have no answer are left out and noted.

    A record has its question in one of QUESTION_FIELDS (a text, turns with role and content, or ShareGPT's turns with
    from and value), its system prompt there or in one of SYSTEM_FIELDS, and its answer in one of ANSWER_FIELDS (a text,
    a number or a list of alternatives; of a solution in GSM8K's form, the text after `####`). An assistant turn at the
    end is not part of the question; it is the answer if no field has one. A record with lists of questions and answers
    gives one question for each entry.
    weights: one for each file (default: 1). max_bad_records: the share of a file's records that may be malformed.
    Raises UserError naming file, record and field if more are malformed, or if no record of a file has an answer.
    """
    if not paths:
        raise UserError("no question file was given; name at least one")
    questions: list[Question] = []
    notes: list[str] = []
    position = 0
    for path, weight in zip(map(Path, paths), weights or [1.0] * len(paths), strict=True):
        file = _QuestionFile(path, position, weight)
        file.read()
        file.check(max_bad_records)
        position += file.count
        questions += file.questions
        notes += file.notes()
    return LoadedQuestions(tuple(questions), tuple(notes))


def join_names(names: Sequence[str], limit: int = 20) -> str:
    """The names, joined by commas; of more than `limit` the first ones and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


class _QuestionFile:
    """Questions of one file, and counts for the notes. position: of its first record among those of all files."""

    def __init__(self, path: Path, position: int, weight: float) -> None:
        self.path, self.position, self.weight = path, position, weight
        self.count = 0
        self.questions: list[Question] = []
        self.first_fields: Sequence[str] = ()
        self.malformed: list[tuple[str, UserError]] = []  # place and fault of each
        self.unanswered: dict[str, list[str]] = defaultdict(list)  # why there is no answer -> places
        self.answer_forms: Counter[str] = Counter()  # RecordAnswers.form -> number of records
        self.unread: Counter[str] = Counter()  # name of a field that is not part of the prompt -> number of records

    def read(self) -> None:
        for record in scan_records(self.path):
            self.first_fields = self.first_fields or tuple(record.fields)
            items = [record.fields] if record.fault else split_columns(lowercase_names(record.fields))
            for number, fields in enumerate(items, 1):
                place = record.place if len(items) == 1 else f"{record.place}, item {number}"
                try:
                    self._add(record, place, fields)
                except UserError as error:
                    self.malformed.append((place, error))
                self.count += 1

    def check(self, max_bad_records: float) -> None:
        """Raise UserError if too many records are malformed, or if none has an answer."""
        if len(self.malformed) == self.count:
            more = f" (all {self.count} records are malformed)" if self.count > 1 else ""
            raise UserError(f"{self.malformed[0][1]}{more}") from self.malformed[0][1]
        if len(self.malformed) > max_bad_records * self.count:
            error = self.malformed[0][1]
            raise UserError(
                f"{error} ({len(self.malformed)} of {self.count} records are malformed; data.max_bad_records="
                f"{max_bad_records:g} is the share that may be left out)"
            ) from error
        if not self.questions:
            raise UserError(
                f"{self.path}: no record has an answer; give it in `answer` or `reward_model.ground_truth` "
                f"(fields of the first: {join_names(self.first_fields)})"
            )

    def notes(self) -> list[str]:
        lines = [
            f"{self.path}: {len(places)} of {self.count} records left out, {reason}: {join_names(places)}"
            for reason, places in self.unanswered.items()
        ]
        if self.malformed:
            places = join_names([place for place, _ in self.malformed])
            summary = f"{len(self.malformed)} of {self.count} records left out, malformed: {places}"
            lines.append(f"{self.path}: {summary}; the first: {self.malformed[0][1]}")
        forms = {
            "####": "whole solutions: what follows #### is the answer",
            r"\boxed": r"whole solutions: the last \boxed{} is the answer",
            "prose": rf"longer than {MAX_PLAIN} characters, with neither a line `#### answer` nor a \boxed{{}}: only a "
            "response that repeats them is right",
        }
        lines += [f"{self.path}: {n} of {self.count} answers are {forms[f]}" for f, n in self.answer_forms.items()]
        lines += [
            f"{self.path}: {n} of {self.count} records have `{name}` beside the question, unseen by the model; "
            "if the model needs it, write it into the question"
            for name, n in self.unread.items()
        ]
        return lines

    def _add(self, record: Record, place: str, fields: Mapping[str, Any]) -> None:
        if record.fault is not None:
            raise record.fault
        source = f"{self.path}, {place}"
        question = read_question(source, fields)
        template = read_template_fields(source, fields)
        answers = read_answers(source, fields, question)
        if answers.missing:
            self.unanswered[answers.missing].append(place)
            return
        if answers.form:
            self.answer_forms[answers.form] += 1
        self.unread.update(unread_fields(source, fields, question))
        turns = question.turns
        text = turns[0].content if len(turns) == 1 and not turns[0].more else turns
        used = {question.field, *ANSWER_FIELDS[:2], *SYSTEM_FIELDS}
        metadata = {k: v for k, v in {**fields, **template}.items() if k not in used}
        number = self.position + self.count
        self.questions.append(Question(number, text, answers.answers, source, metadata, self.weight))
