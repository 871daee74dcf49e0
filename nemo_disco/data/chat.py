"""Conversion between text and tokens: questions to prompts, with the tokenizer's chat template, and responses to text.

Reads no file; independent of engines and grading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from nemo_disco.data.question_fields import Message
from nemo_disco.data.questions import Question, join_names
from nemo_disco.data.template_fields import ARGUMENTS, TOOLS
from nemo_disco.data.template_rendering import Conversation, render
from nemo_disco.data.template_usage import check_arguments, unused_parts
from nemo_disco.data.tokenizer import check_vocabulary
from nemo_disco.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A question and its token ids: the rendered chat template, up to where the response begins."""

    question: Question
    token_ids: list[int]


def encode_prompts(
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    suffix: str,
    max_prompt_length: int,
    too_long: Literal["error", "drop"],
    *,
    system: str | None = None,
    template_arguments: Mapping[str, Any] = MappingProxyType({}),
    vocabulary: int | None = None,
) -> tuple[list[Prompt], list[str]]:
    """The prompts of the questions, in order, and notes: one for dropped prompts, one for each part of the questions
    that the chat template leaves out.

    suffix: appended to the last user turn, unless it ends that turn already. system: system turn for questions without
    one. max_prompt_length: in tokens, the template's included; too_long: raise for a longer prompt, or drop it.
    template_arguments: extra arguments of the chat template; a question's own take precedence. vocabulary: rows of the
    model's embedding.
    Raises UserError naming the question: for a prompt that is too long (or if all are dropped), for a token without a
    row in the embedding, where the template cannot render it (template_rendering.render), and for a template argument
    that the template does not read.
    """
    check_arguments(tokenizer, template_arguments, "data.chat_template_kwargs")
    if not questions:
        return [], []
    tokens, notes = _encode(tokenizer, questions, suffix, system, template_arguments)
    prompts = [Prompt(question, ids) for question, ids in zip(questions, tokens, strict=True)]
    if vocabulary is not None:
        for prompt in prompts:
            check_vocabulary(tokenizer, prompt.token_ids, vocabulary, f"{prompt.question.source}: the prompt")
    fitting = [prompt for prompt in prompts if len(prompt.token_ids) <= max_prompt_length]
    over = [prompt for prompt in prompts if len(prompt.token_ids) > max_prompt_length]
    if over and (too_long == "error" or not fitting):
        remedy = "raise it, or set data.too_long=drop" if fitting else "raise it"
        raise UserError(
            f"{over[0].question.source}: the prompt has {len(over[0].token_ids)} tokens, data.max_prompt_length is "
            f"{max_prompt_length} ({len(over)} of {len(prompts)} questions are over it, the longest has "
            f"{max(len(p.token_ids) for p in over)} tokens); {remedy}"
        )
    if over:
        names = join_names([f"{p.question.source} ({len(p.token_ids)})" for p in over], limit=5)
        limit = f"data.max_prompt_length={max_prompt_length} tokens"
        notes.append(f"{len(over)} of {len(prompts)} questions left out, prompts over {limit}: {names}")
    return fitting, notes


def prompt_lengths(tokenizer: Tokenizer, questions: Sequence[Question], suffix: str = "") -> list[int]:
    """Number of tokens of each question's prompt. Raises UserError where the chat template cannot render one."""
    return [len(ids) for ids in _encode(tokenizer, questions, suffix, None, {})[0]] if questions else []


def _encode(
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    suffix: str,
    system: str | None,
    arguments: Mapping[str, Any],
) -> tuple[list[list[int]], list[str]]:
    """The token ids of each prompt, and a note for each part of the questions that the template leaves out."""
    conversations = [_as_conversation(question, suffix, system, arguments) for question in questions]
    for conversation in conversations:
        own = {name: value for name, value in conversation.arguments.items() if name not in arguments}
        check_arguments(tokenizer, own, f"{conversation.source}: chat_template_kwargs", known_only=False)
    texts = render(tokenizer, conversations)
    # The template has written the special tokens.
    tokens: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return tokens, unused_parts(tokenizer, conversations, texts)


def _as_conversation(question: Question, suffix: str, system: str | None, arguments: Mapping[str, Any]) -> Conversation:
    turns = list(question.messages)
    last = max(i for i, turn in enumerate(turns) if turn.role == "user")
    turns[last] = turns[last]._replace(content=_append_suffix(turns[last].content, suffix))
    if system and turns[0].role not in ("system", "developer"):
        turns.insert(0, Message("system", system))
    tools, own = question.metadata.get(TOOLS) or None, question.metadata.get(ARGUMENTS) or {}
    return Conversation(question.source, [turn.as_dict() for turn in turns], tools, {**arguments, **own})


def _append_suffix(text: str, suffix: str) -> str:
    if text.rstrip().endswith(suffix.strip()):
        return text
    return text + ("" if suffix[0].isspace() else " ") + suffix


def decode(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """A response's text, with its special tokens (`</think>` may be one); remove the stop token before the call."""
    text: str = tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def token_widths(tokenizer: Tokenizer, token_ids: Sequence[int], text: str) -> list[int] | None:
    """Number of characters of `text`, the tokens' decoding, that each token adds; 0 while a character is incomplete.

    None if the tokens decoded one by one do not add up to the text (a tokenizer that rewrites across tokens).
    """
    (anchor,) = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    start = len(decode(tokenizer, [anchor]))

    def decode_after_anchor(ids: Sequence[int]) -> str:
        """Text of tokens that are not the first, where SentencePiece would drop a space."""
        return decode(tokenizer, [anchor, *ids])[start:]

    alone = {token: decode_after_anchor([token]) for token in set(token_ids)}
    pieces: list[str] = []
    pending: list[int] = []  # tokens with the first bytes of a character that later tokens may complete
    for token in token_ids:
        if "\ufffd" not in alone[token]:
            if pending:
                pieces[-1], pending = decode_after_anchor(pending), []
            pieces.append(alone[token])
            continue
        pending.append(token)
        character = decode_after_anchor(pending)
        complete = "\ufffd" not in character
        pieces.append(character if complete else "")
        pending = [] if complete else pending
    if pending:
        pieces[-1] = decode_after_anchor(pending)
    joined = "".join(pieces)
    if joined == " " + text:
        pieces[0] = pieces[0][1:]
    return [len(piece) for piece in pieces] if joined in (text, " " + text) else None
