"""Reading of a record's fields for the chat template: tools and template arguments.

Other fields that a model may need to see are refused (images), or listed as unread (a context, the options to choose
from). Pure: no files, no tokenizer. question_fields.py reads the question, its system prompt and its answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from nemo_disco.data.question_fields import QUESTION_FIELDS, RecordQuestion, read_question
from nemo_disco.runtime.errors import UserError

TOOLS, ARGUMENTS, THINKING = "tools", "chat_template_kwargs", "enable_thinking"
_MEDIA = re.compile(r"(?:image|picture|video|audio)s?(?:_?\d+)?", re.IGNORECASE)
# Names of fields, in common question files, that may hold a part of the question.
_MAYBE_NEEDED = (
    *("instruction", "instructions", "input", "context", "passage", "paragraph", "article", "body", "documents"),
    *("options", "choices", "examples", "history", "functions", "response_format", "reasoning_effort"),
)


def read_template_fields(source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The record's `tools`, a list of JSON schemas, and `chat_template_kwargs`, a mapping of arguments to values to
    which the field `enable_thinking` is added; each only if the record has such fields.

    Raises UserError for malformed values, and for images and sounds, since only text is read.
    """
    for name, value in fields.items():
        if _MEDIA.fullmatch(name) and not _is_empty(value):
            raise UserError(f"{source}: `{name}` is part of the question, and only text is read; leave the record out")
    values = {TOOLS: _read_tools(source, fields.get(TOOLS)), ARGUMENTS: _read_arguments(source, fields)}
    return {name: value for name, value in values.items() if value or name in fields}


def unread_fields(source: str, fields: Mapping[str, Any], question: RecordQuestion) -> list[str]:
    """Names of the fields that a model may need to see, but that are not part of the prompt."""
    needed = [name for name, value in fields.items() if name.lower() in _MAYBE_NEEDED and not _is_empty(value)]
    return needed + [f for f in QUESTION_FIELDS if f != question.field and _differs(source, fields, f, question)]


def _differs(source: str, fields: Mapping[str, Any], field: str, question: RecordQuestion) -> bool:
    """True if the field holds another question than `question`."""
    if _is_empty(fields.get(field)):
        return False
    try:
        return read_question(source, {field: fields[field]}).turns[-1:] != question.turns[-1:]
    except UserError:
        return True


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def _read_tools(source: str, value: Any) -> list[dict[str, Any]]:
    items = _parse_json(source, TOOLS, value)
    if _is_empty(items):
        return []
    schemas = [_parse_json(source, TOOLS, tool) for tool in items] if isinstance(items, list) else []
    tools = [schema for schema in schemas if isinstance(schema, dict)]
    if len(tools) != len(schemas) or not tools:
        raise UserError(f"{source}: `{TOOLS}` is {value!r:.80}; give a list of JSON schemas, one a tool")
    return tools


def _read_arguments(source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    arguments = _parse_json(source, ARGUMENTS, fields.get(ARGUMENTS))
    if not _is_empty(arguments) and not isinstance(arguments, dict):
        raise UserError(f"{source}: `{ARGUMENTS}` is {arguments!r:.80}; give a mapping, such as {{{THINKING}: false}}")
    thinking = _parse_json(source, THINKING, fields.get(THINKING))
    if thinking is not None and not isinstance(thinking, bool):
        raise UserError(f"{source}: `{THINKING}` is {thinking!r:.80}; give true or false")
    return {n: v for n, v in {THINKING: thinking, **(arguments or {})}.items() if v is not None}


def _parse_json(source: str, name: str, value: Any) -> Any:
    """The value of a field that may be JSON text, as tables hold it; None for a blank text."""
    if not isinstance(value, str) or not value.strip():
        return None if isinstance(value, str) else value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: `{name}` is {value!r:.80}, which is not JSON") from error
