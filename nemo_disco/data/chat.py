"""Between text and tokens: the tokenizer of a Hugging Face directory, its chat template, and its stop tokens.

Encodes questions into prompts and decodes responses. Knows nothing of engines or grading; reads local files alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nemo_disco.data.questions import Message, Question, first_of
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.saved_files import FileError, check_directory, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A question as token ids, after the chat template and up to where the response begins."""

    question: Question
    token_ids: list[int]


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of a Hugging Face directory. Raises UserError: none there, no EOS, no chat template."""
    if not Path(path).is_dir():
        raise UserError(f"{path}: there is no such directory; model.path is a Hugging Face directory with a tokenizer")
    from transformers import AutoTokenizer

    check_directory(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and tokenizers raise every kind, down to bare Exception
        remote = "trust_remote_code" in str(error)
        mend = "set model.trust_remote_code=true if you trust it" if remote else "it needs a sound tokenizer.json"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .:")
        raise UserError(f"{path}: no usable tokenizer there: {reason}; {mend}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no EOS token; set `eos_token` in tokenizer_config.json")
    if not tokenizer.chat_template:
        raise UserError(
            f"{path}: the tokenizer has no chat template; put one in chat_template.jinja, or in `chat_template` of "
            "tokenizer_config.json"
        )
    return tokenizer


def encode_prompts(
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    suffix: str,
    max_prompt_length: int,
    too_long: Literal["error", "drop"],
) -> tuple[list[Prompt], list[str]]:
    """Questions as prompts, in order, each with `suffix` after the text of its last user turn if it is not there yet.

    max_prompt_length: tokens, the template's included. Longer ones are dropped if `too_long` says so: then the second
    value has the line that names them. Raises UserError naming the question, its length and the limit if `too_long` is
    "error", or if none would be left.
    """
    if not questions:
        return [], []
    rendered = [_render(tokenizer, question, suffix) for question in questions]
    tokens = tokenizer(rendered, add_special_tokens=False)["input_ids"]  # the template has written the special ones
    prompts = [Prompt(question, ids) for question, ids in zip(questions, tokens, strict=True)]
    kept = [prompt for prompt in prompts if len(prompt.token_ids) <= max_prompt_length]
    over = [prompt for prompt in prompts if len(prompt.token_ids) > max_prompt_length]
    if over and (too_long == "error" or not kept):
        raise UserError(
            f"{over[0].question.source}: the prompt has {len(over[0].token_ids)} tokens, data.max_prompt_length is "
            f"{max_prompt_length} ({len(over)} of {len(prompts)} questions are over it, the longest has "
            f"{max(len(p.token_ids) for p in over)} tokens); raise it" + (", or set data.too_long=drop" if kept else "")
        )
    notes = [
        f"{len(over)} of {len(prompts)} questions left out, prompts over data.max_prompt_length={max_prompt_length} "
        f"tokens: {first_of([f'{p.question.source} ({len(p.token_ids)})' for p in over], most=5)}"
    ]
    return kept, notes if over else []


def prompt_lengths(tokenizer: Tokenizer, questions: Sequence[Question], suffix: str = "") -> list[int]:
    """The tokens of each question's prompt. Raises UserError where the chat template refuses it."""
    rendered = [_render(tokenizer, question, suffix) for question in questions]
    return [len(ids) for ids in tokenizer(rendered, add_special_tokens=False)["input_ids"]] if rendered else []


def _render(tokenizer: Tokenizer, question: Question, suffix: str) -> str:
    import jinja2

    *before, last = question.messages
    turns = [*before, Message(last.role, _with_suffix(last.content, suffix))]
    conversation = [turn._asdict() for turn in turns]
    try:
        text: str = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    except jinja2.TemplateError as error:
        raise UserError(f"{question.source}: the tokenizer's chat template refuses it: {error}") from error
    if not text:
        raise UserError(f"{question.source}: the tokenizer's chat template makes an empty prompt of it")
    return text


def _with_suffix(text: str, suffix: str) -> str:
    if text.rstrip().endswith(suffix.strip()):
        return text
    return text + ("" if suffix[0].isspace() else " ") + suffix


def stop_token_ids(tokenizer: Tokenizer, model_dir: str | Path) -> tuple[int, ...]:
    """What ends a response, rising: the tokenizer's EOS, and those of generation_config.json where there is one."""
    path = Path(model_dir) / "generation_config.json"
    try:
        listed = read_json(path, dict[str, Any], links=True).get("eos_token_id") if path.exists() else None
    except FileError as fault:
        raise UserError(f"{fault}; the model directory is damaged") from None
    ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(isinstance(i, int) and 0 <= i < len(tokenizer) for i in ids):
        raise UserError(f"{path}: `eos_token_id` is {listed}; the tokenizer has ids from 0 to {len(tokenizer) - 1}")
    return tuple(sorted({int(tokenizer.eos_token_id), *ids}))


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
