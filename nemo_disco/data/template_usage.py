"""What a chat template reads of a conversation, and what it leaves out: nothing of a question is dropped unsaid.

Looks at templates as text and at prompts that were made; runs no template.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nemo_disco.data.questions import join_names
from nemo_disco.data.template_rendering import Conversation
from nemo_disco.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

# transformers' own tag, around what an assistant says.
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")


def check_arguments(
    tokenizer: Tokenizer, arguments: Mapping[str, Any], key: str, *, refuse_unread: bool = True
) -> None:
    """Raise UserError for an argument that this program sets itself, and, if `refuse_unread`, for one that the template
    does not read (a misspelt one would have no effect). key: of the mapping of arguments, for the message."""
    if not arguments:
        return
    reserved = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"} - {"kwargs"}
    for name in arguments:
        if name in reserved:
            raise UserError(f"{key}.{name}: set by this program; leave it out")
        if refuse_unread and not _reads(tokenizer, name):
            raise UserError(f"{key}.{name}: the tokenizer's chat template does not use {name}")


def notes_of_unused_parts(
    tokenizer: Tokenizer, conversations: Sequence[Conversation], texts: Sequence[str]
) -> list[str]:
    """A line for each part of the conversations that the template does not show. texts: the prompts it made of them."""
    lacking: dict[str, list[str]] = {}
    known: dict[str, bool] = {}  # whether the template reads a name
    for conversation, text in zip(conversations, texts, strict=True):
        for part in dict.fromkeys(_unseen(tokenizer, conversation, text, known)):
            lacking.setdefault(part, []).append(conversation.source)
    return [
        f"{len(sources)} of {len(texts)} prompts are without {part}, which the tokenizer's chat template does not use: "
        f"{join_names(sources, limit=3)}"
        for part, sources in lacking.items()
    ]


def _unseen(tokenizer: Tokenizer, conversation: Conversation, text: str, known: dict[str, bool]) -> Iterator[str]:
    names = [f"chat_template_kwargs.{name}" for name in conversation.arguments]
    names += ["tools"] if conversation.tools else []
    names += ["tool_calls"] if any("tool_calls" in turn for turn in conversation.messages) else []
    for name in names:
        if name not in known:
            known[name] = _reads(tokenizer, name.rpartition(".")[2])
        if not known[name]:
            yield f"`{name}`"
    for turn in conversation.messages:
        content = turn["content"].strip()
        shown = content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text
        if not shown and turn["role"] != "assistant":  # whose turns may lose their thinking
            yield f"the text of a {turn['role']} turn"


def _reads(tokenizer: Tokenizer, name: str) -> bool:
    """Whether the chat template looks a name up, as a variable or of something else."""
    template = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template]
    return any(name in _names(text, of_turns=name == "tool_calls") for text in texts)


def _names(template: str, of_turns: bool) -> Container[str]:
    """The variables that a template reads; or, of_turns, all that it may read of a turn."""
    import jinja2
    from jinja2 import nodes

    try:
        # Parsed and no more: to compile it would be to work out its constants, which may take for ever.
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", template))
        if of_turns:
            return {n.attr for n in tree.find_all(nodes.Getattr)} | {n.value for n in tree.find_all(nodes.Const)}
        return {node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"}
    except (jinja2.TemplateError, RecursionError):  # rendering it says what is wrong
        return template
