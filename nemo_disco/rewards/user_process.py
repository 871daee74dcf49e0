"""The process that runs a user's reward code: `python -m nemo_disco.rewards.user_process KEY NAME`, for user_pool.py.

It imports the module and says what it is. Standard input then gives what to build and the calls, one base64 pickle a
line; replies are lines of JSON.
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
from collections.abc import Callable
from typing import Any

from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.user_code import called, finite_number, guarded, load, methods

PR_SET_PDEATHSIG = 1


def described(found: Any, name: str) -> dict[str, Any]:
    """The fields of a user_pool.UserCode."""
    kind, takes = type(found).__name__, list[str]()
    if inspect.isclass(found):
        kind = "class"
        with contextlib.suppress(ValueError, TypeError):  # one that is not written in Python may not say
            takes = list(inspect.signature(found).parameters)
    elif inspect.isfunction(found):
        kind = "function"
    elif callable(found):
        kind = "callable"
    return {"kind": kind, "takes": takes, "file": sys.modules[name.partition(":")[0]].__file__ or ""}


def build(key: str, name: str, found: Any, settings: dict[str, Any] | None) -> Callable[..., Any]:
    """The call that the requests are for. found: what `name` names. settings: what a class is built with; None for a
    function.

    Raises UserError for what the user's code raises.
    """
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


class _Code:
    """The user's code: imported by `describe`, built by the first request and called by the others."""

    def __init__(self, key: str, name: str) -> None:
        self.key, self.name = key, name
        self._found: Any = None
        self._call: Callable[..., Any] | None = None

    def describe(self) -> dict[str, Any]:
        self._found = load(self.key, self.name)
        return described(self._found, self.name)

    def take(self, request: Any) -> Any:
        if self._call is not None:
            return self._call(*request)
        self._call = build(self.key, self.name, self._found, request)
        return None


def main() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # what the user's code reads is no request,
    os.dup2(2, 1)  # and what it prints is for people

    def reply(answer: Callable[..., Any], *request: Any) -> None:
        try:
            said = {"value": answer(*request)}
        except UserError as error:
            said = {"error": str(error)}
        replies.write(json.dumps(said).encode() + b"\n")

    code = _Code(*sys.argv[1:])
    reply(code.describe)
    for line in requests:
        reply(code.take, pickle.loads(base64.b64decode(line)))
    os.killpg(0, signal.SIGKILL)  # with what it started


if __name__ == "__main__":
    main()
