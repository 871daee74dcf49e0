"""UserError, the exception for mistakes that a user can correct, and DivergedError, for a run that cannot go on."""

from __future__ import annotations

MAX_MESSAGE = 2000  # characters; a message quotes the user's input, which may be of any length


class UserError(Exception):
    """Bad input. The message says what is wrong, where and what to do; the command line prints it and exits with 2.

    It is always one printable line: line ends, control characters and lone surrogates are escaped.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, MAX_MESSAGE))


class DivergedError(UserError):
    """The policy has diverged, which no new start of the same run mends: the command line exits with 3."""

    exit_code = 3


def printable(text: str, max_length: int) -> str:
    """The text with unprintable characters escaped as in a Python string, and without its middle if it is too long."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    if len(escaped) <= max_length:
        return escaped
    half = max_length // 2
    return f"{escaped[:half]} [...] {escaped[-half:]}"


def one_line(error: BaseException, max_length: int | None = None) -> str:
    """The error's message on one line, cut after `max_length` characters."""
    return " ".join(str(error).split())[:max_length]
