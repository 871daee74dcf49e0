"""Objectives by name, made from a configuration's mapping. The one place that knows them all.

Must not read any other section of a configuration, and leaves bounds to the objectives' own fields.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from nemo_disco.algorithms.objectives.base import Objective
from nemo_disco.algorithms.objectives.constraint import NONE, Constraint
from nemo_disco.algorithms.objectives.disco import DRPO, DisCO, DisCOb
from nemo_disco.algorithms.objectives.length import ALP, GRPOLEAD, HAPO, RLOOLP
from nemo_disco.algorithms.objectives.off_policy import UNCORRECTED, OffPolicy
from nemo_disco.algorithms.objectives.parameters import Checked, key_of, nearest
from nemo_disco.algorithms.objectives.policy_gradient import DAPO, GPG, GRPO, GRPOER, GRPORW, RLOO, DrGRPO
from nemo_disco.algorithms.objectives.preference import TRPA
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.user_code import format_error, is_user_class, load, user_methods

_ALL = (DisCO, DisCOb, DRPO, GRPO, GRPOER, GRPORW, DrGRPO, DAPO, TRPA, GPG, RLOO, RLOOLP, ALP, HAPO, GRPOLEAD)
OBJECTIVES: dict[str, type[Objective]] = {cls.name: cls for cls in _ALL}


def build_objective(mapping: Mapping[str, Any]) -> Objective:
    """The objective that a mapping describes: `name`, and what that objective takes; None means its default.

    name: one of OBJECTIVES, or `module:Class` for a subclass of Objective in a user's own file.
    Raises UserError for an unknown name, score or kind (listing the known ones, the nearest first), for a parameter
    that the objective does not take, and for a value out of its bounds.
    """
    given = _set_keys(mapping, "algorithm")
    cls = _objective_class(given.pop("name", None))
    constraint = given.pop("constraint", None)
    if constraint is not None and not isinstance(constraint, Constraint):
        constraint = _constraint(cls, _set_keys(constraint, "constraint"))
    if constraint is not None:
        given["constraint"] = constraint
    if not isinstance(off_policy := given.get("off_policy", UNCORRECTED), OffPolicy):
        given["off_policy"] = OffPolicy(**_arguments(OffPolicy, _set_keys(off_policy, "off_policy"), "off_policy"))
    arguments = _arguments(cls, given, f"objective {cls.name}")
    return _users(cls, arguments) if is_user_class(cls) else cls(**arguments)


def _users(cls: type[Objective], arguments: dict[str, Any]) -> Objective:
    """A user's objective, made and asked what it reads. Raises UserError, with file and line, for what it raises."""
    try:
        objective = cls(**arguments)
        objective.needs, objective.separable  # noqa: B018 - their own code too
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit too: a user's function does not end the run
        raise UserError(f"objective {cls.name} raised {format_error(user_methods(cls), error)}") from error
    return objective


def _set_keys(mapping: Mapping[str, Any], what: str) -> dict[str, Any]:
    if not isinstance(mapping, Mapping):
        raise UserError(f"{what} must be a mapping; it is {mapping!r}")
    return {key: value for key, value in mapping.items() if value is not None}


def _objective_class(name: Any) -> type[Objective]:
    known = f"{', '.join(nearest(str(name), OBJECTIVES))}, or module:Class of your own"
    if name is None:
        raise UserError(f"algorithm.name is missing; known: {known}")
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if ":" not in str(name):
        raise UserError(f"algorithm.name: there is no objective {name!r}; known: {known}")
    cls = load("algorithm.name", name)
    if not (inspect.isclass(cls) and issubclass(cls, Objective)) or inspect.isabstract(cls):
        raise UserError(
            f"algorithm.name={name} must be a subclass of nemo_disco.algorithms.Objective that defines value"
        )
    return cls


def _constraint(cls: type[Objective], given: dict[str, Any]) -> Constraint:
    if given and "kind" not in given and cls.constraint.kind == NONE:
        raise UserError(
            f"constraint.{next(iter(given))}: objective {cls.name} has no constraint unless constraint.kind is set"
        )
    given = {"kind": cls.constraint.kind} | given
    return Constraint(**_arguments(Constraint, given, "constraint"))


def _arguments(cls: type[Checked], given: dict[str, Any], what: str) -> dict[str, Any]:
    """The mapping under the names of the class's fields."""
    names = {key_of(f): f.name for f in fields(cls)}
    for key in given:
        if key not in names:
            raise UserError(f"{what} does not take {key!r}; it takes: {', '.join(nearest(str(key), names))}")
    return {names[key]: value for key, value in given.items()}
