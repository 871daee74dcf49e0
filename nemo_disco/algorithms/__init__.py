"""The loop and the objectives: what is maximised, and when.

May touch every room below it; the objectives import torch alone. Must not know how a log-prob is computed, how a
response is sampled or how a reward is found.
"""

from nemo_disco.algorithms.objectives import Objective, ObjectiveOutput, SeparableObjective, build_objective
from nemo_disco.algorithms.objectives.mini_batch import MiniBatch, NonFiniteError

__all__ = ["MiniBatch", "NonFiniteError", "Objective", "ObjectiveOutput", "SeparableObjective", "build_objective"]
