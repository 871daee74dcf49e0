"""Reading of a record's question, system prompt and gold answers, in the schemas of common question files.

Pure: no files, no tokenizer, no grading. A malformed field raises a UserError that names the record and the field.
template_fields.py reads the fields with tools and chat template arguments.
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
# In order of precedence: the first one that holds an answer counts.
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
_GSM8K_UNFINISHED = re.compile(r"(?:^|\n)####\s*\Z")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_BOX = re.compile(r"\\boxed\s*\{")
_CODE = re.compile(r"\A\s*[\[{]|^\s*(?:assert|import|from|def|class)\b", re.MULTILINE)  # tests, also as JSON
MAX_PLAIN = 300  # characters of a text that counts as an answer rather than as prose


class Message(NamedTuple):
    """One turn of a conversation. more: the turn's other fields (tool_calls, name, ...), for the chat template."""

    role: str
    content: str
    more: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The turn as chat templates and question files hold it."""
        return {"role": self.role, "content": self.content, **(self.more or {})}


class RecordQuestion(NamedTuple):
    """A record's question. field: the name of its field. reference: the assistant's last turn, if the record has one;
    it is not part of `turns`."""

    field: str
    turns: tuple[Message, ...]
    reference: str | None


class RecordAnswers(NamedTuple):
    """A record's gold answers.

    answers: alternatives, without repetitions and blanks. missing: why there is none, or "". form: "####" or "\\boxed"
    if the answers are extracted from, or boxed in, whole solutions, "prose" for a long text without either, else "".
    """

    answers: tuple[str, ...]
    missing: str = ""
    form: str = ""


def lowercase_names(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields, with the names of question, answer and system fields in lower case (`Problem` -> `problem`)."""
    names = {*QUESTION_FIELDS, *ANSWER_FIELDS, *SYSTEM_FIELDS}
    renamed = {name: name.lower() for name in fields if name.lower() in names and name.lower() not in fields}
    return {renamed.get(name, name): value for name, value in fields.items()} if renamed else fields


def split_columns(fields: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The records that one record holds column by column (lists of n questions, n answers, ...); else the record."""
    texts = fields.get(_first_filled(fields, QUESTION_FIELDS))
    if texts is None or not _is_column(texts):
        return [fields]
    columns = {k for k, v in fields.items() if isinstance(v, list) and len(v) == len(texts)}
    if _first_filled(fields, ANSWER_FIELDS) not in columns:
        return [fields]
    return [{k: v[i] if k in columns else v for k, v in fields.items()} for i in range(len(texts))]


def read_question(source: str, fields: Mapping[str, Any]) -> RecordQuestion:
    """The record's question: turns that end with a user's or a tool's. Raises UserError if there is none."""
    name = _first_filled(fields, QUESTION_FIELDS)
    if not name:
        raise UserError(
            f"{source}: no question; expected one of the fields {', '.join(QUESTION_FIELDS)}, and there are "
            f"{', '.join(map(str, fields)) or 'none'}"
        )
    value = fields[name]
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    if _is_column(value):
        answers = fields.get(_first_filled(fields, ANSWER_FIELDS))
        count = len(answers) if isinstance(answers, list) else 0 if answers is None else 1
        raise UserError(
            f"{source}: `{name}` lists {len(value)} questions, and there are answers to {count} of them; give a list "
            "of as many answers"
        )
    if isinstance(value, str):
        value = _parse_turns(source, name, value)
    if isinstance(value, list):
        turns, reference = _split_reference(source, name, value)
    else:
        turns, reference = [Message("user", _filled_text(source, name, value))], None
    return RecordQuestion(name, (*_system_turn(source, name, fields, turns), *turns), reference)


def _first_filled(fields: Mapping[str, Any], names: Sequence[str]) -> str:
    return next((name for name in names if fields.get(name) is not None), "")


def _is_column(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) for text in value)


def _parse_turns(source: str, name: str, text: str) -> Any:
    """The turns that a text holds as JSON (tables without list columns have them so); else the text itself."""
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


def _split_reference(source: str, name: str, value: list[Any]) -> tuple[list[Message], str | None]:
    """The turns, and the assistant's last turn, the reference, apart from them."""
    turns = [_message(source, f"{name}[{i}]", turn) for i, turn in enumerate(value)]
    reference = turns.pop().content if turns and turns[-1].role == "assistant" else None
    if not turns or turns[-1].role not in ("user", "tool") or all(turn.role != "user" for turn in turns):
        raise UserError(f"{source}: `{name}` holds no question: end it with a user's turn, before any reference turn")
    return turns, reference


def _system_turn(source: str, name: str, fields: Mapping[str, Any], turns: Sequence[Message]) -> list[Message]:
    """The system prompt of a field of its own, as a turn; none if `turns` has it. Raises UserError if two differ."""
    own = {f: _text(source, f, fields[f]) for f in SYSTEM_FIELDS if fields.get(f) is not None}
    own = {f: text for f, text in own.items() if text.strip()}
    if not own:
        return []
    first = {f"{name}[0]": turns[0].content} if turns[0].role in ("system", "developer") else {}
    if len({text.strip() for text in (*own.values(), *first.values())}) > 1:
        raise UserError(f"{source}: {' and '.join(f'`{f}`' for f in (*own, *first))} are two system prompts; keep one")
    return [] if first else [Message("system", next(iter(own.values())))]


def read_answers(source: str, fields: Mapping[str, Any], question: RecordQuestion) -> RecordAnswers:
    """The gold answers in the first of ANSWER_FIELDS that holds some, else in the reference turn. Raises UserError for
    a malformed answer, and a solution that ends before it."""
    candidates = [(f, fields[f]) for f in ANSWER_FIELDS if f in fields]
    candidates += [(question.field, question.reference)] if question.reference is not None else []
    missing = "no answer field"
    for name, value in candidates:
        if name == "reward_model":
            if not isinstance(value, dict | None):
                kind = type(value).__name__
                raise UserError(f"{source}: `reward_model` is of type {kind}, not an object with `ground_truth`")
            name, value = "reward_model.ground_truth", (value or {}).get("ground_truth")
        answers = _extract_final(source, name, _alternatives(source, name, value), name == question.field)
        if answers.answers:
            return answers
        missing = answers.missing or f"`{name}` is {'null' if value is None else 'empty'}"
    return RecordAnswers((), missing)


def answer_text(source: str, name: str, value: Any) -> str:
    """A gold answer as text, numbers without exponent and trailing zeros; "" for null, NaN and blanks.

    Raises UserError for a value that is neither text nor a finite number.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return check_encodable(source, name, value.strip())
    is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if not is_number or not (isinstance(value, int) or math.isfinite(value)):  # isfinite fails on an int of 10**400
        raise UserError(f"{source}: `{name}` is {value!r:.80}; an answer is text, a number, or a list of these")
    if isinstance(value, int) or value == 0:  # -0.0 is 0
        return str(int(value))
    plain = format(Decimal(str(value)), "f")
    return plain.rstrip("0").rstrip(".") if "." in plain else plain


def final_answer(text: str) -> str:
    """The answer after `####` in the last line, as GSM8K ends its solutions, without commas at the thousands; the text
    itself if its last line has no `####`."""
    if (end := _GSM8K.search(text)) is None:
        return text
    answer = end[1].strip()
    return answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer


def check_encodable(source: str, name: str, text: str) -> str:
    """Return the text. Raises UserError for half of a surrogate pair in it, which no tokenizer encodes."""
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"{source}: `{name}` holds half of a surrogate pair, which no tokenizer encodes; remove it")
    return text


def lacks_final_answer(text: str) -> bool:
    """True if the text's last line is `####` without an answer after it."""
    return _GSM8K_UNFINISHED.search(text) is not None


def _extract_final(source: str, name: str, texts: Sequence[str], is_reference: bool) -> RecordAnswers:
    """The texts' final answers, and the form in which the texts hold them.

    A `solution`, or a reference turn, of several lines without `####` or a box is prose and has no answer.
    """
    if any(map(lacks_final_answer, texts)):
        raise UserError(f"{source}: `{name}` ends in `####`, and no answer follows it")
    answers = tuple(dict.fromkeys(map(final_answer, texts)))
    if answers != tuple(texts):
        return RecordAnswers(answers, form="####")
    boxed = bool(answers) and all(_BOX.search(text) for text in answers)
    if is_reference or name == "solution":
        if not any(len(text) > MAX_PLAIN or "\n" in text for text in answers):
            return RecordAnswers(answers)
        if not boxed:
            return RecordAnswers((), rf"`{name}` has no final answer, neither a line `#### answer` nor a \boxed{{}}")
        return RecordAnswers(answers, form=r"\boxed")  # the verifiers look into the box of a gold answer
    if not boxed and any(len(text) > MAX_PLAIN and not _CODE.search(text) for text in answers):
        return RecordAnswers(answers, form="prose")
    return RecordAnswers(answers)


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
    if role in ("assistant", "tool"):  # the content may be empty: of a turn that calls a tool, and of a tool's result
        content = turn["content"] if turn["content"] is not None else ""
        return Message(role, _text(source, f"{name}.content", content), more or None)
    return Message(role, _filled_text(source, f"{name}.content", turn["content"]), more or None)


def _filled_text(source: str, name: str, value: Any) -> str:
    """The text of `value`. Raises UserError if it is blank."""
    text = _text(source, name, value)
    if not text.strip():
        raise UserError(f"{source}: `{name}` is empty")
    return text


def _text(source: str, name: str, value: Any) -> str:
    """The text of `value`: a string, or a list of text parts ({"type": "text", "text": ...}), which become lines."""
    if isinstance(value, list):
        value = "\n".join(_part_text(source, f"{name}[{i}]", part) for i, part in enumerate(value))
    if not isinstance(value, str):
        raise UserError(f"{source}: `{name}` is of type {type(value).__name__}, not text")
    return check_encodable(source, name, value)


def _part_text(source: str, name: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise UserError(f"{source}: `{name}` is a part of type {kind!r:.40}; only parts with `text` are read")
    if (kind := part.get("type", "text")) not in ("text", "input_text", "output_text", None):
        raise UserError(f"{source}: `{name}` is a part of type {kind!r:.40}; only those of type 'text' are read")
    return str(part["text"])


def _alternatives(source: str, name: str, value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else _parse_list(value) or [value]
    return tuple(dict.fromkeys(a for a in (answer_text(source, name, v) for v in values) if a))


def _parse_list(value: Any) -> list[str] | None:
    """The alternatives in a text that is a JSON list of strings (as in some tables); None for any other value."""
    if not isinstance(value, str) or not re.fullmatch(r'\s*\[\s*".*"\s*\]\s*', value, re.DOTALL):
        return None
    try:
        texts = json.loads(value)
    except (ValueError, RecursionError):
        return None
    return texts if all(isinstance(text, str) for text in texts) else None
