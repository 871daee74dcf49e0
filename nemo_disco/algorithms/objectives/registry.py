"""Build an objective from a configuration's mapping, by the name of its class and the parameters that it declares.

Every module beside this one is searched for objectives. Must not read any other section of a configuration.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, TypeGuard

from nemo_disco.algorithms.objectives.base import Objective
from nemo_disco.algorithms.objectives.constraint import NONE, Constraint
from nemo_disco.algorithms.objectives.off_policy import OffPolicy
from nemo_disco.algorithms.objectives.parameters import ParameterSet, key_of, sort_by_similarity
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.user_code import call_guarded, is_user_class, load_object, user_methods


def _shipped_objectives() -> dict[str, type[Objective]]:
    """The concrete Objective classes of all modules in this directory, by name."""
    modules = [import_module(f"{__package__}.{file.stem}") for file in sorted(Path(__file__).parent.glob("[!_]*.py"))]
    classes = [cls for module in modules for cls in vars(module).values() if _is_objective(cls)]
    return {cls.name: cls for cls in classes}


def _is_objective(value: Any) -> TypeGuard[type[Objective]]:
    return inspect.isclass(value) and issubclass(value, Objective) and not inspect.isabstract(value)


OBJECTIVES = _shipped_objectives()
_PARAMETERS = {key_of(f) for cls in OBJECTIVES.values() for f in fields(cls)}


def build_objective(mapping: Mapping[str, Any]) -> Objective:
    """The objective that a mapping describes: its `name`, and values of the parameters that it declares.

    name: one of OBJECTIVES, or `module:Class` for a subclass of Objective in a user's own file. None leaves a parameter
    at its default, and may be given for the parameters of other objectives too.
    Raises UserError for an unknown name, score or kind (listing the known ones, the nearest first), for a parameter
    that the objective does not take, and for a value out of its bounds.
    """
    settings = dict(_mapping(mapping, "algorithm"))
    cls = _objective_class(settings.pop("name", None))
    settings = {key: value for key, value in settings.items() if value is not None or key not in _PARAMETERS}
    arguments = _arguments(cls, settings, f"objective {cls.name}")
    if not isinstance(constraint := arguments.get("constraint", cls.constraint), Constraint):
        arguments["constraint"] = _constraint(cls, constraint)
    if not isinstance(off_policy := arguments.get("off_policy", cls.off_policy), OffPolicy):
        arguments["off_policy"] = replace(cls.off_policy, **_arguments(OffPolicy, off_policy, "off_policy"))
    return _build_users(cls, arguments) if is_user_class(cls) else cls(**arguments)


def parameter_keys(name: str) -> list[str]:
    """The keys that the objective of that name takes. Raises UserError as `build_objective` does."""
    return [key_of(f) for f in fields(_objective_class(name))]


def _build_users(cls: type[Objective], arguments: dict[str, Any]) -> Objective:
    """Build a user's objective and read its properties once. Raises UserError with file and line if its code raises."""

    def build() -> Objective:
        objective = cls(**arguments)
        objective.needs, objective.separable, objective.reward_terms, objective.signals()
        return objective

    users: Objective = call_guarded(f"objective {cls.name}", user_methods(cls), build)
    return users


def _mapping(value: Any, label: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{label} must be a mapping; it is {value!r}")
    return value


def _objective_class(name: Any) -> type[Objective]:
    """The class of that name in OBJECTIVES, or a user's `module:Class`. Raises UserError if there is none."""
    choices = f"{', '.join(sort_by_similarity(str(name), OBJECTIVES))}, or module:Class of your own"
    if name is None:
        raise UserError(f"algorithm.name is missing; known: {choices}")
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if ":" not in str(name):
        raise UserError(f"algorithm.name: there is no objective {name!r}; known: {choices}")
    cls = load_object("algorithm.name", name)
    if not _is_objective(cls):
        raise UserError(
            f"algorithm.name={name} must be a subclass of nemo_disco.algorithms.Objective that defines value"
        )
    return cls


def _constraint(cls: type[Objective], settings: Any) -> Constraint:
    arguments = _arguments(Constraint, settings, "constraint")
    if arguments and "kind" not in arguments and cls.constraint.kind == NONE:
        raise UserError(
            f"constraint.{next(iter(arguments))}: objective {cls.name} has no constraint unless constraint.kind is set"
        )
    return replace(cls.constraint, **arguments)


def _arguments(cls: type[ParameterSet], settings: Any, label: str) -> dict[str, Any]:
    """The values that are not None, under the names of the class's fields. Raises UserError for an unknown key."""
    names = {key_of(f): f.name for f in fields(cls)}
    for key in _mapping(settings, label):
        if key not in names:
            choices = ", ".join(sort_by_similarity(str(key), names))
            raise UserError(f"{label} does not take {key!r}; it takes: {choices}")
    return {names[key]: value for key, value in settings.items() if value is not None}
