"""Fields beside a record's question that change its prompt: tools, and arguments of the chat template. Others that a
model may need to see are refused (images), or named because they are not read (a context, the options to choose from).

Pure: no files, no tokenizer. The question, its system prompt and its answers are question_fields.py's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from nemo_disco.data.question_fields import QUESTION_FIELDS, Asked, asked
from nemo_disco.runtime.errors import UserError

TOOLS, ARGUMENTS, THINKING = "tools", "chat_template_kwargs", "enable_thinking"
_MEDIA = re.compile(r"(?:image|picture|video|audio)s?(?:_?\d+)?", re.IGNORECASE)
# As the common sets name what belongs to a question.
_NEEDED = (
    *("instruction", "instructions", "input", "context", "passage", "paragraph", "article", "body", "documents"),
    *("options", "choices", "examples", "history", "functions", "response_format", "reasoning_effort"),
)


def template_fields(source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What the record gives its chat template beside the conversation, if it has fields for it: `tools`, a list of JSON
    schemas, and `chat_template_kwargs`, a mapping by argument, of which `enable_thinking` may be a field of its own.

    Raises UserError for what is none of these, and for images and sounds, which nothing here reads.
    """
    for name, value in fields.items():
        if _MEDIA.fullmatch(name) and not _empty(value):
            raise UserError(f"{source}: `{name}` is part of the question, and only text is read; leave the record out")
    found = {TOOLS: _tools(source, fields.get(TOOLS)), ARGUMENTS: _arguments(source, fields)}
    return {name: value for name, value in found.items() if value or name in fields}


def unread_fields(source: str, fields: Mapping[str, Any], question: Asked) -> list[str]:
    """The fields that a model might have to see, and that are not part of the prompt."""
    needed = [name for name, value in fields.items() if name.lower() in _NEEDED and not _empty(value)]
    return needed + [f for f in QUESTION_FIELDS if f != question.field and _asks_more(source, fields, f, question)]


def _asks_more(source: str, fields: Mapping[str, Any], field: str, question: Asked) -> bool:
    """Whether another question field asks something else."""
    if _empty(fields.get(field)):
        return False
    try:
        return asked(source, {field: fields[field]}).turns[-1:] != question.turns[-1:]
    except UserError:
        return True


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def _tools(source: str, value: Any) -> list[dict[str, Any]]:
    parsed = _parsed(source, TOOLS, value)
    if _empty(parsed):
        return []
    schemas = [_parsed(source, TOOLS, tool) for tool in parsed] if isinstance(parsed, list) else []
    tools = [schema for schema in schemas if isinstance(schema, dict)]
    if len(tools) != len(schemas) or not tools:
        raise UserError(f"{source}: `{TOOLS}` is {value!r:.80}; give a list of JSON schemas, one a tool")
    return tools


def _arguments(source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    arguments = _parsed(source, ARGUMENTS, fields.get(ARGUMENTS))
    if not _empty(arguments) and not isinstance(arguments, dict):
        raise UserError(f"{source}: `{ARGUMENTS}` is {arguments!r:.80}; give a mapping, such as {{{THINKING}: false}}")
    thinking = _parsed(source, THINKING, fields.get(THINKING))
    if thinking is not None and not isinstance(thinking, bool):
        raise UserError(f"{source}: `{THINKING}` is {thinking!r:.80}; give true or false")
    return {n: v for n, v in {THINKING: thinking, **(arguments or {})}.items() if v is not None}


def _parsed(source: str, name: str, value: Any) -> Any:
    """A value that a table holds as JSON text."""
    if not isinstance(value, str) or not value.strip():
        return None if isinstance(value, str) else value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: `{name}` is {value!r:.80}, which is not JSON") from error
