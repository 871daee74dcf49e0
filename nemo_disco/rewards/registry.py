"""From the reward's settings to the verifier that they name.

The math grader's and the code tests' processes start with the first answer; the verifier is to be closed.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

from nemo_disco.config.schema import RewardConfig
from nemo_disco.rewards import user_pool
from nemo_disco.rewards.code.python_tests import PythonTests
from nemo_disco.rewards.math.grader import MathGrader
from nemo_disco.rewards.verdict import Verdict
from nemo_disco.rewards.verifiers import ExactMatch, MultipleChoice, NumericMatch, UserClass, UserFunction
from nemo_disco.runtime.errors import UserError

VERIFIERS: dict[str, Callable[..., Any]] = {
    "math": MathGrader,
    "exact": ExactMatch,
    "numeric": NumericMatch,
    "choice": MultipleChoice,
    "python_tests": PythonTests,
}
_SETTINGS = ["require_think", "timeout", "workers"]  # which other keys of the section decide


class Grader(Protocol):
    """What every verifier is: MathGrader's interface."""

    def grade(self, responses: Any, answers: Any) -> list[float]: ...

    def grade_with_reasons(self, responses: Any, answers: Any) -> list[Verdict]: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: Any) -> None: ...


def build_verifier(config: RewardConfig, workers: int) -> Grader:
    """The verifier `config.verifier`: one of VERIFIERS, or `module:name` of the user's own: a function of (response,
    answers), or a class of MathGrader's interface.

    workers: processes on this rank. Raises UserError for an unknown name, and for a parameter that it does not take.
    """
    name, users_class = config.verifier, False
    if name in VERIFIERS:
        make = VERIFIERS[name]
        takes = list(inspect.signature(make).parameters)
    elif ":" in name:
        code = user_pool.describe("reward.verifier", name)
        if code.kind not in ("class", "function", "callable"):
            raise UserError(f"reward.verifier={name}: it is a {code.kind}, neither function nor class")
        users_class = code.kind == "class"
        make, takes = partial(UserFunction, name), code.takes if users_class else _SETTINGS
    else:
        raise UserError(f"reward.verifier={name}: there are {', '.join(VERIFIERS)}, and module:name of your own")
    if unknown := [key for key in config.parameters if key not in takes]:
        settable = sorted(set(takes) - {*_SETTINGS})
        raise UserError(
            f"reward.parameters: {name} takes no {unknown[0]!r}; it takes {', '.join(settable) or 'no parameters'}"
        )
    settings = {"require_think": config.require_think, "timeout": config.timeout, "workers": workers}
    given = {key: value for key, value in settings.items() if key in takes} | config.parameters
    if users_class:
        return UserClass(name, given | ({"workers": 1} if "workers" in takes else {}), config.timeout, workers)
    grader: Grader = make(**given)
    return grader


def verifier_code(config: RewardConfig) -> str:
    """A hash of the code that judges: the user's file, or this package's. For a verifier that was built."""
    if config.verifier not in VERIFIERS:
        return user_pool.source_hash(config.verifier)
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
