"""Questions: what is asked, and which answers are right, from files in the common schemas.

Turns records into Questions and says what it left out. Touches no tokenizer and grades nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from nemo_disco.data.records import read_records
from nemo_disco.runtime.errors import UserError

_QUESTION_FIELDS = ("problem", "question", "prompt", "messages")
_ANSWER_FIELDS = ("answer", "reward_model")
_ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Question:
    """One question.

    id: its position over all records of all files, in the order given (records that were left out count too).
    text: what the user asks; or, if it is more than one user turn, the conversation, which ends with a user turn.
    answers: alternatives, any of which is right. source: file and record, for messages. metadata: the other fields.
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


@dataclass(frozen=True)
class Loaded:
    """notes: one line for each file and reason that left records out, naming them."""

    questions: tuple[Question, ...]
    notes: tuple[str, ...]


def load_questions(paths: Sequence[str | Path], weights: Sequence[float] | None = None) -> Loaded:
    """The questions of all files, in order; records without an answer are left out and noted.

    A record has its question in `problem`, `question`, `prompt` or `messages` (text or a list of role and content) and
    its answer in `answer` or `reward_model.ground_truth` (text, a number or a list of alternatives). An assistant turn
    at the end of a list is the reference: not part of the question, and the answer if there is no other.
    weights: one a file (default: 1 each).
    Raises UserError naming file, record and field.
    """
    if not paths:
        raise UserError("no question file was given")
    questions: list[Question] = []
    notes: list[str] = []
    position = 0
    for path, weight in zip(map(Path, paths), weights or [1.0] * len(paths), strict=True):
        records = read_records(path)
        missing: dict[str, list[str]] = {}
        kept = len(questions)
        for place, fields in records:
            question, lack = _question(position, f"{path}, {place}", fields)
            position += 1
            if lack:
                missing.setdefault(lack, []).append(place)
            else:
                questions.append(replace(question, weight=weight))
        if len(questions) == kept:
            fields_seen = ", ".join(records[0].fields)
            raise UserError(
                f"{path}: no record has an answer; give it in `answer` or `reward_model.ground_truth` "
                f"(fields of the first: {fields_seen})"
            )
        notes += [
            f"{path}: {len(places)} of {len(records)} records left out, {lack}: {first_of(places)}"
            for lack, places in missing.items()
        ]
    return Loaded(tuple(questions), tuple(notes))


def first_of(names: Sequence[str], most: int = 20) -> str:
    """The names as a phrase, cut after `most`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _question(position: int, source: str, fields: Mapping[str, Any]) -> tuple[Question, str]:
    """The question, and what its answer lacks ("" if it has one)."""
    name = next((f for f in _QUESTION_FIELDS if fields.get(f) is not None), None)
    if name is None:
        raise UserError(f"{source}: no question; expected one of the fields {', '.join(_QUESTION_FIELDS)}")
    text, reference = _conversation(source, name, fields[name])
    candidates = [(f, fields[f]) for f in _ANSWER_FIELDS if f in fields]
    candidates += [(name, reference)] if reference is not None else []
    lack = "no answer field"
    answers: tuple[str, ...] = ()
    for where, value in candidates:
        if where == "reward_model":
            where, value = "reward_model.ground_truth", _ground_truth(source, value)
        answers = _answers(source, where, value)
        if answers:
            break
        lack = f"`{where}` is {'null' if value is None else 'empty'}"
    metadata = {k: v for k, v in fields.items() if k != name and k not in _ANSWER_FIELDS}
    return Question(position, text, answers, source, metadata), "" if answers else lack


def _conversation(source: str, name: str, value: Any) -> tuple[str | tuple[Message, ...], str | None]:
    """What is asked, and the assistant's reference at the end if there is one."""
    if not isinstance(value, list):
        return _text(source, name, value), None
    turns = [_message(source, f"{name}[{i}]", turn) for i, turn in enumerate(value)]
    reference = turns.pop().content if turns and turns[-1].role == "assistant" else None
    if not turns or turns[-1].role != "user":
        raise UserError(f"{source}: `{name}` must ask something: its last turn, before any reference, is the user's")
    return (turns[0].content if len(turns) == 1 else tuple(turns)), reference


def _message(source: str, name: str, turn: Any) -> Message:
    if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
        raise UserError(f"{source}: `{name}` is not an object with `role` and `content`")
    if turn["role"] not in _ROLES:
        raise UserError(f"{source}: `{name}.role` is {turn['role']!r}, not one of {', '.join(_ROLES)}")
    return Message(turn["role"], _text(source, f"{name}.content", turn["content"]))


def _text(source: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{source}: `{name}` is of type {type(value).__name__}, not text")
    if not value.strip():
        raise UserError(f"{source}: `{name}` is empty")
    return _encodable(source, name, value)


def _encodable(source: str, name: str, value: str) -> str:
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise UserError(f"{source}: `{name}` holds half of a surrogate pair, which no tokenizer encodes")
    return value


def _ground_truth(source: str, value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise UserError(
            f"{source}: `reward_model` is of type {type(value).__name__}, not an object with `ground_truth`"
        )
    return value.get("ground_truth")


def _answers(source: str, name: str, value: Any) -> tuple[str, ...]:
    """The alternatives as text, without repetitions and blanks."""
    values = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(a for a in (_answer(source, name, v) for v in values) if a))


def _answer(source: str, name: str, value: Any) -> str:
    """One alternative as text: numbers in plain notation, integral ones without a point; "" if there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return _encodable(source, name, value.strip())
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal) or not math.isfinite(value):
        raise UserError(f"{source}: `{name}` is {value!r:.80}; an answer is text, a number, or a list of these")
    if isinstance(value, int):
        return str(value)
    plain = format(Decimal(str(value)), "f")
    return plain.rstrip("0").rstrip(".") if "." in plain else plain
