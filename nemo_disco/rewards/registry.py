"""Builds the grader that `reward.verifier` names: one of this package's, or the user's own."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from nemo_disco.config.schema import RewardConfig
from nemo_disco.rewards import user_pool
from nemo_disco.rewards.code.python_tests import PythonTests
from nemo_disco.rewards.grader import Grader
from nemo_disco.rewards.math.grader import MathGrader
from nemo_disco.rewards.text_graders import ExactMatch, MultipleChoice, NumericMatch
from nemo_disco.rewards.user_graders import UserClass, UserFunction
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.user_code import module_file

VERIFIERS: dict[str, Callable[..., Any]] = {
    "math": MathGrader,
    "exact": ExactMatch,
    "numeric": NumericMatch,
    "choice": MultipleChoice,
    "python_tests": PythonTests,
}
_SETTINGS = ["require_think", "timeout", "workers"]  # keys of the reward section that a grader may have as parameters


def build_verifier(config: RewardConfig, workers: int) -> Grader:
    """The grader that `config.verifier` names: one of VERIFIERS, or `module:name` of the user's function of (response,
    answers) or class of MathGrader's interface. Its processes start with the first answer and end with `close`.

    workers: processes on this rank. Raises UserError for an unknown name, and for a parameter that the grader lacks.
    """
    name, is_users_class = config.verifier, False
    if name in VERIFIERS:
        make = VERIFIERS[name]
        keys = list(inspect.signature(make).parameters)
    elif ":" in name:
        code = user_pool.describe_code("reward.verifier", name)
        if code.kind not in ("class", "function", "callable"):
            raise UserError(f"reward.verifier={name} is of type {code.kind}, neither function nor class")
        is_users_class = code.kind == "class"
        make, keys = partial(UserFunction, name), code.parameters if is_users_class else _SETTINGS
    else:
        raise UserError(
            f"reward.verifier={name} is unknown; choose one of {', '.join(VERIFIERS)}, or module:name of your own"
        )
    if unknown := [key for key in config.parameters if key not in keys]:
        settable = sorted(set(keys) - {*_SETTINGS})
        raise UserError(
            f"reward.parameters: {name} takes no {unknown[0]!r}; it takes {', '.join(settable) or 'no parameters'}"
        )
    settings = {"require_think": config.require_think, "timeout": config.timeout, "workers": workers}
    arguments = {key: value for key, value in settings.items() if key in keys} | config.parameters
    if is_users_class:
        return UserClass(name, arguments | ({"workers": 1} if "workers" in keys else {}), config.timeout, workers)
    grader: Grader = make(**arguments)
    return grader


def hash_verifier(config: RewardConfig) -> str:
    """SHA-256 of the verifier's code: of this package, or of the user's file without the files that it imports; "" if
    there is none."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    if config.verifier not in VERIFIERS:
        if not (file := module_file(config.verifier)):
            return ""
        files = [Path(file)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
