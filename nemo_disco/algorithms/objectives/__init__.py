"""The objectives of the papers, each beside its equation, as plain functions of one mini-batch's log-probs.

Imports torch alone. Must not know a policy, an engine, a packing plan or a configuration's other sections.
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
