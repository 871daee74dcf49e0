"""The one error for what a user can mend."""

from __future__ import annotations

LONGEST = 2000  # characters of a message; what a user gave is quoted in it, and may be of any length


class UserError(Exception):
    """Bad input: what is wrong, where, what to do, in one line. The command line prints it and exits with 2.

    The message is always one printable line: line ends, control characters and lone surrogates are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, LONGEST))


def printable(text: str, longest: int) -> str:
    """The text with every unprintable character escaped as in a Python string, and cut in the middle if too long."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    if len(shown) <= longest:
        return shown
    half = longest // 2
    return f"{shown[:half]} [...] {shown[-half:]}"
