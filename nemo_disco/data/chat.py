"""Between text and tokens: questions become prompts by the tokenizer's chat template, responses become text.

Knows nothing of engines or grading, and reads no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from nemo_disco.data.prompt_fields import ARGUMENTS, TOOLS
from nemo_disco.data.questions import Question, first_of
from nemo_disco.data.schemas import Message
from nemo_disco.data.template import Conversation, render
from nemo_disco.data.template_reading import check_arguments, left_out
from nemo_disco.data.tokenizer import refuse_beyond
from nemo_disco.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A question as token ids, after the chat template and up to where the response begins."""

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
    """Questions as prompts, in order, each with `suffix` after the text of its last user turn if it is not there yet.

    max_prompt_length: tokens, the template's included. Longer ones are dropped if `too_long` says so. The second value
    has a line for these, and one for each part of a question that the template leaves out. system: a system turn for
    questions without one. template_arguments: what the chat template takes beside the conversation; a question's own
    come first. vocabulary: rows of the model's embedding.
    Raises UserError naming the question, its length and the limit if `too_long` is "error", or if none would be left;
    for a token beyond the embedding; where the template does not make a prompt of it (template.render), or does not
    read one of `template_arguments`.
    """
    check_arguments(tokenizer, template_arguments, "data.chat_template_kwargs")
    if not questions:
        return [], []
    tokens, notes = _tokens(tokenizer, questions, suffix, system, template_arguments)
    prompts = [Prompt(question, ids) for question, ids in zip(questions, tokens, strict=True)]
    if vocabulary is not None:
        for prompt in prompts:
            refuse_beyond(tokenizer, prompt.token_ids, vocabulary, f"{prompt.question.source}: the prompt")
    kept = [prompt for prompt in prompts if len(prompt.token_ids) <= max_prompt_length]
    over = [prompt for prompt in prompts if len(prompt.token_ids) > max_prompt_length]
    if over and (too_long == "error" or not kept):
        raise UserError(
            f"{over[0].question.source}: the prompt has {len(over[0].token_ids)} tokens, data.max_prompt_length is "
            f"{max_prompt_length} ({len(over)} of {len(prompts)} questions are over it, the longest has "
            f"{max(len(p.token_ids) for p in over)} tokens); raise it" + (", or set data.too_long=drop" if kept else "")
        )
    if over:
        names = first_of([f"{p.question.source} ({len(p.token_ids)})" for p in over], most=5)
        limit = f"data.max_prompt_length={max_prompt_length} tokens"
        notes.append(f"{len(over)} of {len(prompts)} questions left out, prompts over {limit}: {names}")
    return kept, notes


def prompt_lengths(tokenizer: Tokenizer, questions: Sequence[Question], suffix: str = "") -> list[int]:
    """The tokens of each question's prompt. Raises UserError where the chat template does not make one of it."""
    return [len(ids) for ids in _tokens(tokenizer, questions, suffix, None, {})[0]] if questions else []


def _tokens(
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    suffix: str,
    system: str | None,
    arguments: Mapping[str, Any],
) -> tuple[list[list[int]], list[str]]:
    """The token ids of each prompt, and what the template leaves out."""
    conversations = [_conversation(question, suffix, system, arguments) for question in questions]
    for conversation in conversations:
        own = {name: value for name, value in conversation.arguments.items() if name not in arguments}
        check_arguments(tokenizer, own, f"{conversation.source}: chat_template_kwargs", unread=False)
    texts = render(tokenizer, conversations)
    # The template has written the special tokens.
    tokens: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return tokens, left_out(tokenizer, conversations, texts)


def _conversation(question: Question, suffix: str, system: str | None, arguments: Mapping[str, Any]) -> Conversation:
    turns = list(question.messages)
    last = max(i for i, turn in enumerate(turns) if turn.role == "user")
    turns[last] = turns[last]._replace(content=_with_suffix(turns[last].content, suffix))
    if system and turns[0].role not in ("system", "developer"):
        turns.insert(0, Message("system", system))
    tools, own = question.metadata.get(TOOLS) or None, question.metadata.get(ARGUMENTS) or {}
    return Conversation(question.source, [turn.as_dict() for turn in turns], tools, {**arguments, **own})


def _with_suffix(text: str, suffix: str) -> str:
    if text.rstrip().endswith(suffix.strip()):
        return text
    return text + ("" if suffix[0].isspace() else " ") + suffix


def decode(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """A response as text. Special tokens stay, since `</think>` may be one; take the stop token off before."""
    text: str = tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def token_widths(tokenizer: Tokenizer, token_ids: Sequence[int], text: str) -> list[int] | None:
    """How many characters of `text`, which the tokens decode to, each token makes; 0 while a character is incomplete.

    None where the text is not what its tokens make one by one (a tokenizer that rewrites across tokens).
    """
    (anchor,) = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    start = len(decode(tokenizer, [anchor]))

    def after_another(ids: Sequence[int]) -> str:
        """Not at the beginning, where SentencePiece drops a space."""
        return decode(tokenizer, [anchor, *ids])[start:]

    alone = {token: after_another([token]) for token in set(token_ids)}
    pieces: list[str] = []
    pending: list[int] = []  # bytes of a character that the next tokens may complete
    for token in token_ids:
        if "\ufffd" not in alone[token]:
            if pending:
                pieces[-1], pending = after_another(pending), []
            pieces.append(alone[token])
            continue
        pending.append(token)
        so_far = after_another(pending)
        complete = "\ufffd" not in so_far
        pieces.append(so_far if complete else "")
        pending = [] if complete else pending
    if pending:
        pieces[-1] = after_another(pending)
    made = "".join(pieces)
    if made == " " + text:
        pieces[0] = pieces[0][1:]
    return [len(piece) for piece in pieces] if made in (text, " " + text) else None
