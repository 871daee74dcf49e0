"""The schemas in which people keep questions: from a record's fields to a conversation and its gold answers.

Pure: no files, no tokenizer, no grading. What is malformed is a UserError that names source and field.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from nemo_disco.runtime.errors import UserError

QUESTION_FIELDS = ("problem", "question", "prompt", "messages", "conversations")
# In this order: the first that has an answer.
ANSWER_FIELDS = ("answer", "reward_model", "answers", "final_answer", "ground_truth", "label", "solution")
_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {
    **{role: role for role in _ROLES},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
_GSM8K = re.compile(r"(?:^|\n)####[ \t]*(\S[^\n]*)\s*\Z")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_BOX = re.compile(r"\\boxed\s*\{")
PLAIN = 300  # characters of a `solution` that may be the answer itself


class Message(NamedTuple):
    """One turn of a conversation. more: what else the turn has (tool_calls, name, ...), for the chat template."""

    role: str
    content: str
    more: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """As chat templates and question files have it."""
        return {"role": self.role, "content": self.content, **(self.more or {})}


class Asked(NamedTuple):
    """What a record asks. field: where it stands. reference: the assistant's turn at the end, if there is one."""

    field: str
    turns: tuple[Message, ...]
    reference: str | None


class Gold(NamedTuple):
    """What a record's answers are.

    answers: alternatives, without repetitions and blanks. lack: why there is none, or "". taken: "####" or "\\boxed"
    where the answer was taken out of a whole solution, else "".
    """

    answers: tuple[str, ...]
    lack: str = ""
    taken: str = ""


def one_each(fields: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The record, or the records that it holds column by column: lists of n questions, n answers, and so on."""
    name = next((f for f in QUESTION_FIELDS if fields.get(f) is not None), "")
    texts = fields.get(name)
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        return [fields]
    columns = {k for k, v in fields.items() if isinstance(v, list) and len(v) == len(texts)}
    if not columns & set(ANSWER_FIELDS):
        return [fields]
    return [{k: v[i] if k in columns else v for k, v in fields.items()} for i in range(len(texts))]


def asked(source: str, fields: Mapping[str, Any]) -> Asked:
    """What the record asks: a conversation that ends with the user's turn, or a tool's. Raises UserError."""
    name = next((f for f in QUESTION_FIELDS if fields.get(f) is not None), None)
    if name is None:
        raise UserError(f"{source}: no question; expected one of the fields {', '.join(QUESTION_FIELDS)}")
    value = fields[name]
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    if not isinstance(value, list):
        return Asked(name, (Message("user", _filled(source, name, value)),), None)
    turns = [_message(source, f"{name}[{i}]", turn) for i, turn in enumerate(value)]
    reference = turns.pop().content if turns and turns[-1].role == "assistant" else None
    if not turns or turns[-1].role not in ("user", "tool") or all(turn.role != "user" for turn in turns):
        raise UserError(f"{source}: `{name}` must ask something: its last turn, before any reference, is the user's")
    system = fields.get("system")
    if name == "conversations" and isinstance(system, str) and system.strip() and turns[0].role != "system":
        turns.insert(0, Message("system", encodable(source, "system", system)))
    return Asked(name, tuple(turns), reference)


def gold(source: str, fields: Mapping[str, Any], question: Asked) -> Gold:
    """The record's answers: of the first field that has some, else the reference turn. Raises UserError."""
    candidates = [(f, fields[f]) for f in ANSWER_FIELDS if f in fields]
    candidates += [(question.field, question.reference)] if question.reference is not None else []
    lack = "no answer field"
    for where, value in candidates:
        if where == "reward_model":
            where, value = "reward_model.ground_truth", _ground_truth(source, value)
        found = _taken(where, _alternatives(source, where, value))
        if found.answers:
            return found
        lack = found.lack or f"`{where}` is {'null' if value is None else 'empty'}"
    return Gold((), lack)


def alternative(source: str, name: str, value: Any) -> str:
    """One gold answer as text: numbers in plain notation, integral ones without a point; "" if there is none.

    Raises UserError for what is neither text nor a number.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return encodable(source, name, value.strip())
    is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if not is_number or not (isinstance(value, int) or math.isfinite(value)):  # no float holds 10**400
        raise UserError(f"{source}: `{name}` is {value!r:.80}; an answer is text, a number, or a list of these")
    if isinstance(value, int):
        return str(value)
    plain = format(Decimal(str(value)), "f")
    return plain.rstrip("0").rstrip(".") if "." in plain else plain


def final_of(text: str) -> str:
    """What stands after `####` in a text's last line, as GSM8K ends its solutions, without a comma at the thousands;
    the text itself if nothing does."""
    if (end := _GSM8K.search(text)) is None:
        return text
    answer = end[1].strip()
    return answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer


def encodable(source: str, name: str, value: str) -> str:
    """The text. Raises UserError for half of a surrogate pair in it."""
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise UserError(f"{source}: `{name}` holds half of a surrogate pair, which no tokenizer encodes")
    return value


def _taken(where: str, answers: Sequence[str]) -> Gold:
    """The final answers of solutions that end in one; a `solution` that is prose has none."""
    short = tuple(dict.fromkeys(map(final_of, answers)))
    if short != tuple(answers):
        return Gold(short, taken="####")
    if where == "solution" and any(len(text) > PLAIN or "\n" in text for text in short):
        if not all(_BOX.search(text) for text in short):
            return Gold((), r"`solution` has no final answer, neither a line `#### answer` nor a \boxed{}")
        return Gold(short, taken=r"\boxed")  # the verifiers look into the box of a gold answer
    return Gold(short)


def _message(source: str, name: str, turn: Any) -> Message:
    if isinstance(turn, dict) and {"from", "value"} <= turn.keys() and "role" not in turn:
        if not isinstance(turn["from"], str) or turn["from"] not in _SHAREGPT:
            raise UserError(f"{source}: `{name}.from` is {turn['from']!r:.40}, not one of {', '.join(_SHAREGPT)}")
        turn = {k: v for k, v in turn.items() if k not in ("from", "value")} | {
            "role": _SHAREGPT[turn["from"]],
            "content": turn["value"],
        }
    if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
        raise UserError(f"{source}: `{name}` is not an object with `role` and `content`")
    role = turn["role"]
    if role not in _ROLES:
        raise UserError(f"{source}: `{name}.role` is {role!r:.40}, not one of {', '.join(_ROLES)}")
    more = {str(k): v for k, v in turn.items() if k not in ("role", "content") and v is not None}
    if role in ("assistant", "tool"):  # a call of a tool says nothing, and a tool may return nothing
        content = turn["content"] if turn["content"] is not None else ""
        return Message(role, _text(source, f"{name}.content", content), more or None)
    return Message(role, _filled(source, f"{name}.content", turn["content"]), more or None)


def _filled(source: str, name: str, value: Any) -> str:
    text = _text(source, name, value)
    if not text.strip():
        raise UserError(f"{source}: `{name}` is empty")
    return text


def _text(source: str, name: str, value: Any) -> str:
    """A text, or the text parts of a list ({"type": "text", "text": ...}), a line each."""
    if isinstance(value, list):
        value = "\n".join(_part(source, f"{name}[{i}]", part) for i, part in enumerate(value))
    if not isinstance(value, str):
        raise UserError(f"{source}: `{name}` is of type {type(value).__name__}, not text")
    return encodable(source, name, value)


def _part(source: str, name: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise UserError(f"{source}: `{name}` is a part of type {kind!r:.40}; only parts with `text` are read")
    if (kind := part.get("type", "text")) not in ("text", None):
        raise UserError(f"{source}: `{name}` is a part of type {kind!r:.40}; only those of type 'text' are read")
    return str(part["text"])


def _ground_truth(source: str, value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise UserError(
            f"{source}: `reward_model` is of type {type(value).__name__}, not an object with `ground_truth`"
        )
    return value.get("ground_truth")


def _alternatives(source: str, name: str, value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(a for a in (alternative(source, name, v) for v in values) if a))
