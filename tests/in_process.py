"""A command, called in this process: whatever it is given, it does its work or ends in one line."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence

from nemo_disco import cli


def ends_well(arguments: Sequence[str], main: Callable[[Sequence[str]], int] = cli.main) -> str:
    """The line with which it refuses, or "". Fails for any other end, such as an exception that it lets through."""
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as end:  # argparse's
            code = end.code if err.getvalue().startswith("usage: ") else None
    lines = [line for line in err.getvalue().splitlines() if line.startswith(("error: ", "usage: "))]
    assert (code, len(lines)) in ((0, 0), (2, 1)) and "Traceback" not in err.getvalue(), err.getvalue()
    assert not lines or lines[0].isprintable()
    return lines[0] if lines else ""
