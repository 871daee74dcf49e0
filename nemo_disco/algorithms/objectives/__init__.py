"""The papers' objectives, each with its equation, as pure functions of one mini-batch's log-probs.

To add one: a module here whose class declares its parameters (`parameter`), and conf/algorithm/NAME.yaml. Imports torch
alone; must not know a policy, an engine, a packing plan or other sections of the configuration.
"""

from nemo_disco.algorithms.objectives.base import Objective, ObjectiveOutput, SeparableObjective, Tokens
from nemo_disco.algorithms.objectives.constraint import Constraint
from nemo_disco.algorithms.objectives.parameters import parameter
from nemo_disco.algorithms.objectives.registry import OBJECTIVES, build_objective
from nemo_disco.algorithms.objectives.signals import Signal

__all__ = [
    "OBJECTIVES",
    "Constraint",
    "Objective",
    "ObjectiveOutput",
    "SeparableObjective",
    "Signal",
    "Tokens",
    "build_objective",
    "parameter",
]
