"""Calls of a command in this process, for tests that give it any input: it must succeed or be refused in one line."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence

from nemo_disco import cli


def run_in_process(arguments: Sequence[str], main: Callable[[Sequence[str]], int] = cli.main) -> str:
    """Call a command. Returns the line of its error ("error: ..." or "usage: ..."), or "" if it succeeds.

    Fails for any other outcome: an exception, a traceback, another exit code than 0 and 2, an unprintable line.
    """
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as ending:  # raised by argparse
            code = ending.code if err.getvalue().startswith("usage: ") else None
    lines = [line for line in err.getvalue().splitlines() if line.startswith(("error: ", "usage: "))]
    assert (code, len(lines)) in ((0, 0), (2, 1)) and "Traceback" not in err.getvalue(), err.getvalue()
    assert not lines or lines[0].isprintable()
    return lines[0] if lines else ""
