"""The schemas in which people keep questions: from a record's fields to a conversation and its gold answers.

Pure: no files, no tokenizer, no grading. What is malformed is a UserError that names source and field.
Fields that change a prompt beside the question and its system prompt are template_fields.py's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from nemo_disco.runtime.errors import UserError

QUESTION_FIELDS = ("problem", "question", "prompt", "messages", "conversations")
# In this order: the first that has an answer.
ANSWER_FIELDS = (
    *("answer", "reward_model", "answers", "final_answer", "expected_answer", "ground_truth", "label", "solution"),
)
SYSTEM_FIELDS = ("system", "system_prompt")
_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {
    **{role: role for role in _ROLES},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
_GSM8K = re.compile(r"(?:^|\n)####(?!#)[ \t]*(\S[^\n]*)\s*\Z")
_UNFINISHED = re.compile(r"(?:^|\n)####\s*\Z")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_BOX = re.compile(r"\\boxed\s*\{")
_CODE = re.compile(r"\A\s*[\[{]|^\s*(?:assert|import|from|def|class)\b", re.MULTILINE)  # tests, also as JSON
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
    where the answer was taken out of a whole solution, "prose" where it is a long text without either, else "".
    """

    answers: tuple[str, ...]
    lack: str = ""
    taken: str = ""


def usual_names(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields, those of questions and answers under the names here, however they are capitalised (`Problem`)."""
    known = {*QUESTION_FIELDS, *ANSWER_FIELDS, *SYSTEM_FIELDS}
    renamed = {name: name.lower() for name in fields if name.lower() in known and name.lower() not in fields}
    return {renamed.get(name, name): value for name, value in fields.items()} if renamed else fields


def one_each(fields: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The record, or the records that it holds column by column: lists of n questions, n answers, and so on."""
    texts = fields.get(_question_field(fields))
    if texts is None or not _several(texts):
        return [fields]
    columns = {k for k, v in fields.items() if isinstance(v, list) and len(v) == len(texts)}
    if _first_answers(fields) not in columns:
        return [fields]
    return [{k: v[i] if k in columns else v for k, v in fields.items()} for i in range(len(texts))]


def asked(source: str, fields: Mapping[str, Any]) -> Asked:
    """What the record asks: a conversation that ends with the user's turn, or a tool's. Raises UserError."""
    name = _question_field(fields)
    if not name:
        raise UserError(
            f"{source}: no question; expected one of the fields {', '.join(QUESTION_FIELDS)}, and there are "
            f"{', '.join(map(str, fields)) or 'none'}"
        )
    value = fields[name]
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    if _several(value):
        answers = fields.get(_first_answers(fields))
        count = len(answers) if isinstance(answers, list) else 0 if answers is None else 1
        raise UserError(
            f"{source}: `{name}` lists {len(value)} questions, and there are answers to {count} of them; give a list "
            "of as many answers"
        )
    if isinstance(value, str):
        value = _turns_of_text(source, name, value)
    if isinstance(value, list):
        turns, reference = _conversation(source, name, value)
    else:
        turns, reference = [Message("user", _filled(source, name, value))], None
    return Asked(name, (*_system_turn(source, name, fields, turns), *turns), reference)


def _question_field(fields: Mapping[str, Any]) -> str:
    return next((f for f in QUESTION_FIELDS if fields.get(f) is not None), "")


def _first_answers(fields: Mapping[str, Any]) -> str:
    return next((f for f in ANSWER_FIELDS if fields.get(f) is not None), "")


def _several(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) for text in value)


def _turns_of_text(source: str, name: str, text: str) -> Any:
    """The turns that a text holds as JSON, as tables have them that know no lists; or the text itself."""
    if text.strip()[:1] not in ("[", "{"):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    keys = [turn.keys() if isinstance(turn, dict) else () for turn in value] if isinstance(value, list) else []
    if keys and all({"role", "content"} <= set(k) or {"from", "value"} <= set(k) for k in keys):
        return value
    if name in ("messages", "conversations"):
        raise UserError(
            f"{source}: `{name}` is a text; give a list of turns with `role` and `content`, or that as JSON"
        )
    return text


def _conversation(source: str, name: str, value: list[Any]) -> tuple[list[Message], str | None]:
    """The turns before a reference at the end, and the reference."""
    turns = [_message(source, f"{name}[{i}]", turn) for i, turn in enumerate(value)]
    reference = turns.pop().content if turns and turns[-1].role == "assistant" else None
    if not turns or turns[-1].role not in ("user", "tool") or all(turn.role != "user" for turn in turns):
        raise UserError(f"{source}: `{name}` must ask something: its last turn, before any reference, is the user's")
    return turns, reference


def _system_turn(source: str, name: str, fields: Mapping[str, Any], turns: Sequence[Message]) -> list[Message]:
    """The system prompt that stands in a field of its own, as a turn. Raises UserError for two different ones."""
    given = {f: _text(source, f, fields[f]) for f in SYSTEM_FIELDS if fields.get(f) is not None}
    given = {f: text for f, text in given.items() if text.strip()}
    if not given:
        return []
    there = {f"{name}[0]": turns[0].content} if turns[0].role in ("system", "developer") else {}
    if len({text.strip() for text in (*given.values(), *there.values())}) > 1:
        raise UserError(
            f"{source}: {' and '.join(f'`{f}`' for f in (*given, *there))} are two system prompts; keep one"
        )
    return [] if there else [Message("system", next(iter(given.values())))]


def gold(source: str, fields: Mapping[str, Any], question: Asked) -> Gold:
    """The record's answers: of the first field that has some, else the reference turn. Raises UserError."""
    candidates = [(f, fields[f]) for f in ANSWER_FIELDS if f in fields]
    candidates += [(question.field, question.reference)] if question.reference is not None else []
    lack = "no answer field"
    for where, value in candidates:
        if where == "reward_model":
            where, value = "reward_model.ground_truth", _ground_truth(source, value)
        found = _taken(source, where, _alternatives(source, where, value), where == question.field)
        if found.answers:
            return found
        lack = found.lack or f"`{where}` is {'null' if value is None else 'empty'}"
    return Gold((), lack)


def answer_text(source: str, name: str, value: Any) -> str:
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
    if isinstance(value, int) or value == 0:  # -0.0 is 0
        return str(int(value))
    plain = format(Decimal(str(value)), "f")
    return plain.rstrip("0").rstrip(".") if "." in plain else plain


def final_answer(text: str) -> str:
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


def lacks_final_answer(text: str) -> bool:
    """Whether a text ends in a line `####` without the answer that should follow."""
    return _UNFINISHED.search(text) is not None


def _taken(source: str, where: str, answers: Sequence[str], reference: bool) -> Gold:
    """The final answers of solutions that end in one; a `solution`, or a reference turn, that is prose has none."""
    if any(map(lacks_final_answer, answers)):
        raise UserError(f"{source}: `{where}` ends in `####`, and no answer follows it")
    short = tuple(dict.fromkeys(map(final_answer, answers)))
    if short != tuple(answers):
        return Gold(short, taken="####")
    boxed = bool(short) and all(_BOX.search(text) for text in short)
    if reference or where == "solution":
        if not any(len(text) > PLAIN or "\n" in text for text in short):
            return Gold(short)
        if not boxed:
            return Gold((), rf"`{where}` has no final answer, neither a line `#### answer` nor a \boxed{{}}")
        return Gold(short, taken=r"\boxed")  # the verifiers look into the box of a gold answer
    if not boxed and any(len(text) > PLAIN and not _CODE.search(text) for text in short):
        return Gold(short, taken="prose")
    return Gold(short)


def _message(source: str, name: str, turn: Any) -> Message:
    if isinstance(turn, dict) and {"from", "value"} <= turn.keys() and "role" not in turn:
        sender = str(turn["from"]).lower()
        if sender not in _SHAREGPT:
            raise UserError(f"{source}: `{name}.from` is {turn['from']!r:.40}, not one of {', '.join(_SHAREGPT)}")
        rest = {k: v for k, v in turn.items() if k not in ("from", "value")}
        turn = rest | {"role": _SHAREGPT[sender], "content": turn["value"]}
    if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
        raise UserError(f"{source}: `{name}` is not an object with `role` and `content`")
    role = str(turn["role"]).lower()
    if role not in _ROLES:
        raise UserError(f"{source}: `{name}.role` is {turn['role']!r:.40}, not one of {', '.join(_ROLES)}")
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
    if (kind := part.get("type", "text")) not in ("text", "input_text", "output_text", None):
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
    values = value if isinstance(value, list) else _listed(value) or [value]
    return tuple(dict.fromkeys(a for a in (answer_text(source, name, v) for v in values) if a))


def _listed(value: Any) -> list[str] | None:
    """The alternatives that a text lists as JSON, `["a", "b"]`, as some tables have them."""
    if not isinstance(value, str) or not re.fullmatch(r'\s*\[\s*".*"\s*\]\s*', value, re.DOTALL):
        return None
    try:
        texts = json.loads(value)
    except (ValueError, RecursionError):
        return None
    return texts if all(isinstance(text, str) for text in texts) else None
