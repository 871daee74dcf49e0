"""From the reward's settings to the verifier that they name.

The math grader's and the code tests' processes start with the first answer; the verifier is to be closed.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self

from nemo_disco.config.schema import RewardConfig
from nemo_disco.rewards.code_tests import PythonTests
from nemo_disco.rewards.math_grader import MathGrader
from nemo_disco.rewards.verdict import Verdict
from nemo_disco.rewards.verifiers import ExactMatch, MultipleChoice, NumericMatch, UserClass, UserFunction
from nemo_disco.runtime import user_code
from nemo_disco.runtime.errors import UserError

VERIFIERS: dict[str, Callable[..., Any]] = {
    "math": MathGrader,
    "exact": ExactMatch,
    "numeric": NumericMatch,
    "choice": MultipleChoice,
    "python_tests": PythonTests,
}


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
    elif ":" in name:
        found = user_code.load("reward.verifier", name)
        users_class = inspect.isclass(found)
        make = found if users_class else _of_function(found, name)
    else:
        raise UserError(f"reward.verifier={name}: there are {', '.join(VERIFIERS)}, and module:name of your own")
    takes = inspect.signature(make).parameters
    if unknown := [key for key in config.parameters if key not in takes]:
        settable = sorted(takes.keys() - {"require_think", "timeout", "workers"})
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
        return user_code.source_hash(config.verifier)
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _of_function(function: Any, name: str) -> Callable[..., UserFunction]:
    if not callable(function):
        raise UserError(f"reward.verifier={name}: it is a {type(function).__name__}, neither function nor class")

    def make(require_think: bool = False, timeout: float = 5.0, workers: int = 2) -> UserFunction:
        return UserFunction(name, require_think, timeout, workers)

    return make
