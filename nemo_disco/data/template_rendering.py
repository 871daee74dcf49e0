"""Rendering of conversations with a tokenizer's chat template, in a child process that can be killed.

A template is a program from the model's author: it may fail in any way, never end, or ask for all memory. The child
has limits on processor time and memory, touches no file, and sends one JSON message for each conversation.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from nemo_disco.runtime.errors import UserError, one_line
from nemo_disco.runtime.host import set_limit
from nemo_disco.runtime.stop_signals import shield_children

if TYPE_CHECKING:
    from multiprocessing.context import ForkProcess

    from transformers import PreTrainedTokenizerBase as Tokenizer

CPU_SECONDS = 5  # processor time for one conversation; real templates take a millisecond
WALL_SECONDS = 300  # wall-clock time without an answer, in case the machine does not run the child at all
EXTRA_MEMORY = 1 << 30  # bytes beyond the parent's size
MAX_CHARACTERS = 10_000_000  # of a prompt


class Conversation(NamedTuple):
    """Input of a chat template. source: the question's file and record, for error messages. messages: turns with role,
    content and other fields. tools: JSON schemas. arguments: the template's other arguments, by name."""

    source: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    arguments: Mapping[str, Any] = MappingProxyType({})


def render(tokenizer: Tokenizer, conversations: Sequence[Conversation]) -> list[str]:
    """The prompt of each conversation as text, up to where the response begins.

    Raises UserError naming the conversation if the template refuses it, fails, returns no text or more than
    MAX_CHARACTERS, or does not end within CPU_SECONDS.
    """
    if not conversations:
        return []
    context = multiprocessing.get_context("fork")  # takes milliseconds; a new interpreter would import for seconds
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_serve, args=(sender, tokenizer, conversations), daemon=True)
    with shield_children(), warnings.catch_warnings():
        # Python 3.12 warns of forks beside threads. The child takes no lock that another thread may hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        child.start()
    sender.close()
    try:
        return [_receive_text(receiver, child, conversation.source) for conversation in conversations]
    finally:
        child.kill()
        child.join()
        receiver.close()


def _receive_text(receiver: Connection, child: ForkProcess, source: str) -> str:
    where = f"{source}: the tokenizer's chat template"
    try:
        if not receiver.poll(WALL_SECONDS):
            raise UserError(f"{where} did not finish in {WALL_SECONDS} s; look at what it does with this question")
        answer: dict[str, str] = json.loads(receiver.recv_bytes())
    except EOFError:
        child.join()
        code = -(child.exitcode or 0)
        if code == signal.SIGXCPU:
            raise UserError(f"{where} does not end: stopped after {CPU_SECONDS} s; mend its loop") from None
        raise UserError(f"{where} ended its process (signal {code}); mend chat_template.jinja") from None
    if "text" not in answer:
        raise UserError(f"{where} {answer['error']}")
    return answer["text"]


def _serve(channel: Connection, tokenizer: Tokenizer, conversations: Sequence[Conversation]) -> None:
    """Run in the child: render each conversation and send its text or error, then exit."""
    try:
        with contextlib.suppress(OSError):  # without /proc there is no memory limit
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            set_limit(resource.RLIMIT_AS, size + EXTRA_MEMORY)
        set_limit(resource.RLIMIT_CORE, 0)
        for conversation in conversations:
            used = resource.getrusage(resource.RUSAGE_SELF)
            set_limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + CPU_SECONDS)
            channel.send_bytes(json.dumps(_render_one(tokenizer, conversation)).encode())
    finally:
        os._exit(0)  # skips the closing and flushing of files that belong to the parent


def _render_one(tokenizer: Tokenizer, conversation: Conversation) -> dict[str, str]:
    """`{"text": prompt}`, or `{"error": predicate of a sentence whose subject is the template}`."""
    import jinja2

    try:
        text = tokenizer.apply_chat_template(
            conversation.messages,
            tools=conversation.tools,
            add_generation_prompt=True,
            tokenize=False,
            **conversation.arguments,
        )
        if not isinstance(text, str) or not text:
            return {"error": "returns no text"}
        if len(text) > MAX_CHARACTERS:
            return {"error": f"returns {len(text):,} characters; the limit is {MAX_CHARACTERS:,}"}
        text.encode()  # fails on half of a surrogate pair, which no tokenizer takes
    except jinja2.TemplateError as error:
        return {"error": f"refuses this question: {one_line(error, 300)}"}
    except BaseException as error:  # a template is a program, and may raise anything
        return {"error": f"fails with {type(error).__name__}{': ' if str(error) else ''}{one_line(error, 300)}"}
    return {"text": text}
