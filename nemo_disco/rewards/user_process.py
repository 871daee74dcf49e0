"""The process that runs a user's reward code for user_pool.py: `python -m nemo_disco.rewards.user_process KEY NAME`.

It imports the module and replies with its description. Standard input then has a class's arguments (None for a
function), and after that the calls, one base64 pickle a line; each reply is a line of JSON.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import inspect
import json
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.user_code import call_for_number, call_guarded, check_number, load_object, user_methods

PR_SET_PDEATHSIG = 1


def describe(code: Any) -> dict[str, Any]:
    """The fields of a user_pool.CodeDescription."""
    kind, parameters = type(code).__name__, list[str]()
    if inspect.isclass(code):
        kind = "class"
        with contextlib.suppress(ValueError, TypeError):  # one that is not written in Python may have no signature
            parameters = list(inspect.signature(code).parameters)
    elif inspect.isfunction(code):
        kind = "function"
    elif callable(code):
        kind = "callable"
    return {"kind": kind, "parameters": parameters}


def build_call(key: str, name: str, code: Any, settings: dict[str, Any] | None) -> Callable[..., Any]:
    """The function that a request's arguments are passed to. settings: a class's arguments; None for a function.

    Raises UserError if the user's code raises.
    """
    if settings is None:
        return lambda *args: call_for_number(key, name, code, *args)
    methods = user_methods(code)
    grader = call_guarded(f"{key}={name}", methods, lambda: code(**settings))

    def grade(method: str, response: str, answers: tuple[str, ...]) -> Any:
        """The reward if the method is `grade`, else (reward, reason)."""
        results = list(call_guarded(f"{key}={name}", methods, lambda: getattr(grader, method)([response], [answers])))
        if len(results) != 1:
            raise UserError(f"{key}={name}: {method} must return one result a response; it gave {len(results)} for one")
        if method == "grade":
            return check_number(key, name, inspect.getfile(code), results[0])
        return check_number(key, name, inspect.getfile(code), results[0].reward), str(results[0].reason)

    return grade


def serve(key: str, name: str, requests: Iterator[bytes]) -> Iterator[Any]:
    """The replies: the code's description, once it is imported; None, once a class is built by the first request; then
    the result of each call."""
    code = load_object(key, name)
    yield describe(code)
    call = build_call(key, name, code, pickle.loads(base64.b64decode(next(requests))))
    yield None
    for line in requests:
        yield call(*pickle.loads(base64.b64decode(line)))


def main() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # the user's code must read no request as its input,
    os.dup2(2, 1)  # and its output goes to stderr, not among the replies
    try:
        for value in serve(sys.argv[1], sys.argv[2], iter(requests)):
            replies.write(json.dumps({"value": value}).encode() + b"\n")
    except UserError as error:
        replies.write(json.dumps({"error": str(error)}).encode() + b"\n")
    os.killpg(0, signal.SIGKILL)  # this process and all that it started


if __name__ == "__main__":
    main()
