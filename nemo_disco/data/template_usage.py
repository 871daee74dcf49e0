"""Checks of what a chat template uses, so that no argument and no part of a question is dropped in silence.

Parses templates and searches rendered prompts; renders no template.
"""

from __future__ import annotations

import inspect
import json
import re
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nemo_disco.data.questions import join_names
from nemo_disco.data.template_rendering import Conversation
from nemo_disco.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

# transformers' own tag around an assistant's text, which jinja2 alone cannot parse.
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")


def check_arguments(tokenizer: Tokenizer, arguments: Mapping[str, Any], key: str, *, known_only: bool = True) -> None:
    """Raise UserError for an argument that this program sets itself, and, if `known_only`, for one that the template
    does not read (a misspelt one would have no effect). key: of the mapping of arguments, for the message."""
    if not arguments:
        return
    reserved = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"} - {"kwargs"}
    for name in arguments:
        if name in reserved:
            raise UserError(f"{key}.{name}: set by this program; leave it out")
        if known_only and not _reads(tokenizer, name):
            raise UserError(f"{key}.{name}: the tokenizer's chat template does not use {name}")


def unused_parts(tokenizer: Tokenizer, conversations: Sequence[Conversation], texts: Sequence[str]) -> list[str]:
    """A line for each kind of part (an argument, the tools, a turn's text) that rendered prompts `texts` lack."""
    missing: dict[str, list[str]] = defaultdict(list)  # part -> sources
    cache: dict[str, bool] = {}  # name -> True if the template reads it
    for conversation, text in zip(conversations, texts, strict=True):
        for part in dict.fromkeys(_find_unused(tokenizer, conversation, text, cache)):
            missing[part].append(conversation.source)
    return [
        f"{len(sources)} of {len(texts)} prompts are without {part}, which the tokenizer's chat template does not use: "
        f"{join_names(sources, limit=3)}"
        for part, sources in missing.items()
    ]


def _find_unused(tokenizer: Tokenizer, conversation: Conversation, text: str, cache: dict[str, bool]) -> Iterator[str]:
    names = [f"chat_template_kwargs.{name}" for name in conversation.arguments]
    names += ["tools"] if conversation.tools else []
    names += ["tool_calls"] if any("tool_calls" in turn for turn in conversation.messages) else []
    for name in names:
        if name not in cache:
            cache[name] = _reads(tokenizer, name.rpartition(".")[2])
        if not cache[name]:
            yield f"`{name}`"
    for turn in conversation.messages:
        content = turn["content"].strip()
        present = content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text
        if not present and turn["role"] != "assistant":  # templates may drop the thinking of earlier assistant turns
            yield f"the text of a {turn['role']} turn"


def _reads(tokenizer: Tokenizer, name: str) -> bool:
    """True if the chat template reads the name, as a variable or, for tool_calls, as a field of a turn."""
    template = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template]
    return any(name in _find_names(text, turn_fields=name == "tool_calls") for text in texts)


def _find_names(template: str, turn_fields: bool) -> Container[str]:
    """Names of the variables that a template reads; with turn_fields, of all fields that it may read of a turn."""
    import jinja2
    from jinja2 import nodes

    try:
        # Parsed only: compiling would evaluate constant expressions, which may take forever.
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", template))
        if turn_fields:
            return {n.attr for n in tree.find_all(nodes.Getattr)} | {n.value for n in tree.find_all(nodes.Const)}
        return {node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"}
    except (jinja2.TemplateError, RecursionError):  # search its text; rendering it reports the error
        return template
