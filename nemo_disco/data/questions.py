"""Questions: what is asked, and which answers are right, from files in the common schemas.

Turns records into Questions and says what it left out. Touches no tokenizer and grades nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_disco.data.question_fields import (
    ANSWER_FIELDS,
    PLAIN,
    SYSTEM_FIELDS,
    Asked,
    Gold,
    Message,
    asked,
    gold,
    one_each,
    usual_names,
)
from nemo_disco.data.record_files import Record, scan_records
from nemo_disco.data.template_fields import template_fields, unread_fields
from nemo_disco.runtime.errors import UserError

MAX_BAD = 0.1  # the share of a file's records that may be malformed; conf/data/default.yaml has the same


@dataclass(frozen=True)
class Question:
    """One question.

    id: its position over all records of all files, in the order given (records that were left out count too).
    text: what the user asks; or, if it is more than one user turn, the conversation, which ends with a user turn.
    answers: alternatives, any of which is right. source: file and record, for messages. metadata: the other fields,
    with what the chat template takes beside the conversation (template_fields.template_fields).
    weight: how often an epoch asks it, on the average of its file.
    """

    id: int
    text: str | tuple[Message, ...]
    answers: tuple[str, ...]
    source: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation, also where it is one user turn."""
        return (Message("user", self.text),) if isinstance(self.text, str) else self.text

    @property
    def user_text(self) -> str:
        """What the user says, without system prompts and other turns."""
        return "\n\n".join(turn.content for turn in self.messages if turn.role == "user")


@dataclass(frozen=True)
class Loaded:
    """notes: one line for each file and reason that left records out, took answers out of solutions, or read a part of
    a record alone."""

    questions: tuple[Question, ...]
    notes: tuple[str, ...]


def load_questions(
    paths: Sequence[str | Path], weights: Sequence[float] | None = None, max_bad_records: float = MAX_BAD
) -> Loaded:
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
        raise UserError("no question file was given")
    questions: list[Question] = []
    notes: list[str] = []
    position = 0
    for path, weight in zip(map(Path, paths), weights or [1.0] * len(paths), strict=True):
        file = _File(path, position, weight)
        file.read()
        file.check(max_bad_records)
        position += file.count
        questions += file.questions
        notes += file.notes()
    return Loaded(tuple(questions), tuple(notes))


def join_names(names: Sequence[str], limit: int = 20) -> str:
    """The names, joined by commas; of more than `limit` the first ones and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


class _File:
    """The questions of one file, whose records begin at `position` of all; and what was left out, by its reason."""

    def __init__(self, path: Path, position: int, weight: float) -> None:
        self.path, self.position, self.weight = path, position, weight
        self.count = 0
        self.questions: list[Question] = []
        self.first_fields: Sequence[str] = ()
        self.bad: list[tuple[str, UserError]] = []  # place, what is wrong
        self.lacking: dict[str, list[str]] = {}  # reason: places
        self.taken: dict[str, int] = {}  # what marked the answer in a solution: how often
        self.unread: dict[str, int] = {}  # fields that are not part of the prompt: how often

    def read(self) -> None:
        for record in scan_records(self.path):
            self.first_fields = self.first_fields or tuple(record.fields)
            items = [record.fields] if record.fault else one_each(usual_names(record.fields))
            for number, fields in enumerate(items, 1):
                place = record.place if len(items) == 1 else f"{record.place}, item {number}"
                try:
                    self._take(record, place, fields)
                except UserError as error:
                    self.bad.append((place, error))
                self.count += 1

    def check(self, max_bad_records: float) -> None:
        """Raises UserError if too much of the file is malformed, or nothing of it has an answer."""
        if len(self.bad) == self.count:
            more = f" (all {self.count} records are malformed)" if self.count > 1 else ""
            raise UserError(f"{self.bad[0][1]}{more}") from self.bad[0][1]
        if len(self.bad) > max_bad_records * self.count:
            error = self.bad[0][1]
            raise UserError(
                f"{error} ({len(self.bad)} of {self.count} records are malformed; data.max_bad_records="
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
            for reason, places in self.lacking.items()
        ]
        if self.bad:
            places = join_names([place for place, _ in self.bad])
            what = f"{len(self.bad)} of {self.count} records left out, malformed: {places}"
            lines.append(f"{self.path}: {what}; the first: {self.bad[0][1]}")
        words = {
            "####": "whole solutions: what follows #### is the answer",
            r"\boxed": r"whole solutions: the last \boxed{} is the answer",
            "prose": rf"longer than {PLAIN} characters, with neither a line `#### answer` nor a \boxed{{}}: a response "
            "must repeat them to be right",
        }
        lines += [f"{self.path}: {n} of {self.count} answers are {words[kind]}" for kind, n in self.taken.items()]
        lines += [
            f"{self.path}: {n} of {self.count} records have `{name}` beside the question, unseen by the model; "
            "if it has to, write it into the question"
            for name, n in self.unread.items()
        ]
        return lines

    def _take(self, record: Record, place: str, fields: Mapping[str, Any]) -> None:
        if record.fault is not None:
            raise record.fault
        source = f"{self.path}, {place}"
        question = asked(source, fields)
        template = template_fields(source, fields)
        answer = gold(source, fields, question)
        if answer.lack:
            self.lacking.setdefault(answer.lack, []).append(place)
            return
        if answer.taken:
            self.taken[answer.taken] = self.taken.get(answer.taken, 0) + 1
        for name in unread_fields(source, fields, question):
            self.unread[name] = self.unread.get(name, 0) + 1
        self.questions.append(self._question(source, {**fields, **template}, question, answer))

    def _question(self, source: str, fields: Mapping[str, Any], question: Asked, answer: Gold) -> Question:
        turns = question.turns
        text = turns[0].content if len(turns) == 1 and not turns[0].more else turns
        used = {question.field, *ANSWER_FIELDS[:2], *SYSTEM_FIELDS}
        metadata = {k: v for k, v in fields.items() if k not in used}
        return Question(self.position + self.count, text, answer.answers, source, metadata, self.weight)
