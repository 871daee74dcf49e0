"""Chat templates at work: conversations become text in a child process, which can be ended.

A template is a program of whoever made the model: it may fail in any way, never end, or ask for all memory. The child
has a limit on processor time and memory, touches no file, and tells the parent one line of JSON a conversation.
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

from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.signals import spared_children

if TYPE_CHECKING:
    from multiprocessing.context import ForkProcess

    from transformers import PreTrainedTokenizerBase as Tokenizer

SECONDS = 5  # of processor time, for one conversation: real templates take a millisecond
PATIENCE = 300  # seconds of wall clock without an answer: a machine that does not run the child at all
MEMORY = 1 << 30  # bytes beyond what this process has
LONGEST = 10_000_000  # characters of a prompt


class Conversation(NamedTuple):
    """messages: role, content and what else the template takes. tools: their JSON schemas. source: for messages.
    arguments: what the template takes beside these, by name."""

    source: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    arguments: Mapping[str, Any] = MappingProxyType({})


def render(tokenizer: Tokenizer, conversations: Sequence[Conversation]) -> list[str]:
    """The text of each conversation, up to where the response begins.

    Raises UserError, naming the conversation: the template refuses it, fails, makes nothing or too much of it, or does
    not end in SECONDS of processor time.
    """
    if not conversations:
        return []
    context = multiprocessing.get_context("fork")  # milliseconds, where a new interpreter imports for seconds
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_serve, args=(sender, tokenizer, conversations), daemon=True)
    with spared_children(), warnings.catch_warnings():
        # Python 3.12 warns of forks beside threads. The child takes no lock that another thread may hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        child.start()
    sender.close()
    try:
        return [_answer(receiver, child, conversation.source) for conversation in conversations]
    finally:
        child.kill()
        child.join()
        receiver.close()


def _answer(receiver: Connection, child: ForkProcess, source: str) -> str:
    where = f"{source}: the tokenizer's chat template"
    try:
        if not receiver.poll(PATIENCE):
            raise UserError(f"{where} gives no answer in {PATIENCE} s; look at what it does with this question")
        answer: dict[str, str] = json.loads(receiver.recv_bytes())
    except EOFError:
        child.join()
        code = -(child.exitcode or 0)
        if code == signal.SIGXCPU:
            raise UserError(f"{where} does not end: stopped after {SECONDS} s; mend its loop") from None
        raise UserError(f"{where} ended its process (signal {code}); mend chat_template.jinja") from None
    if "text" not in answer:
        raise UserError(f"{where} {answer['error']}")
    return answer["text"]


def _serve(channel: Connection, tokenizer: Tokenizer, conversations: Sequence[Conversation]) -> None:
    """The child's whole life."""
    try:
        with contextlib.suppress(OSError):  # no /proc: no limit of memory
            held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            _limit(resource.RLIMIT_AS, held + MEMORY)
        _limit(resource.RLIMIT_CORE, 0)
        for conversation in conversations:
            used = resource.getrusage(resource.RUSAGE_SELF)
            _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + SECONDS)
            channel.send_bytes(json.dumps(_rendered(tokenizer, conversation)).encode())
    finally:
        os._exit(0)  # nothing of the parent's is to be closed or flushed here


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _rendered(tokenizer: Tokenizer, conversation: Conversation) -> dict[str, str]:
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
            return {"error": "makes an empty prompt of it"}
        if len(text) > LONGEST:
            return {"error": f"makes {len(text):,} characters of it; {LONGEST:,} are the limit"}
        text.encode()  # half of a surrogate pair, which no tokenizer takes
    except jinja2.TemplateError as error:
        return {"error": f"refuses it: {_line(error)}"}
    except BaseException as error:  # a template is a program, and may raise anything
        return {"error": f"fails on it: {type(error).__name__}{': ' if str(error) else ''}{_line(error)}"}
    return {"text": text}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
