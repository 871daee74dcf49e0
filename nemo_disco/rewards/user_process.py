"""The process that runs a user's reward code: `python -m nemo_disco.rewards.user_process KEY NAME`, for user_pool.py.

Standard input gives what to build and then the calls, one base64 pickle a line; replies are lines of JSON.
"""

from __future__ import annotations

import base64
import ctypes
import inspect
import json
import os
import pickle
import signal
import sys
from collections.abc import Callable
from typing import Any

from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.user_code import called, finite_number, guarded, load, methods

PR_SET_PDEATHSIG = 1


def build(key: str, name: str, settings: dict[str, Any] | None) -> Callable[..., Any]:
    """The call that the requests are for. settings: what a class is built with; None for a function.

    Raises UserError for what the user's code raises.
    """
    found = load(key, name)
    if settings is None:
        return lambda *args: called(key, name, found, *args)
    users = [*methods(found)]
    grader = guarded(key, name, users, lambda: found(**settings))

    def judge(method: str, response: str, answers: tuple[str, ...]) -> Any:
        """A reward where the method is `grade`, else (reward, reason)."""
        results = list(guarded(key, name, users, lambda: getattr(grader, method)([response], [answers])))
        if len(results) != 1:
            raise UserError(f"{key}={name}: {method} must return one result a response; it gave {len(results)} for one")
        if method == "grade":
            return finite_number(key, name, inspect.getfile(found), results[0])
        return finite_number(key, name, inspect.getfile(found), results[0].reward), str(results[0].reason)

    return judge


def main() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # what the user's code reads is no request,
    os.dup2(2, 1)  # and what it prints is for people
    key, name = sys.argv[1:]
    call: Callable[..., Any] | None = None
    reply: dict[str, Any]
    for line in requests:
        given = pickle.loads(base64.b64decode(line))
        try:
            if call is None:
                call, reply = build(key, name, given), {}
            else:
                reply = {"value": call(*given)}
        except UserError as error:
            reply = {"error": str(error)}
        replies.write(json.dumps(reply).encode() + b"\n")
    os.killpg(0, signal.SIGKILL)  # with what it started


if __name__ == "__main__":
    main()
