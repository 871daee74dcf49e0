"""The loop and the objectives: what is maximised, and when.

May touch every room below it; the objectives import torch alone. Must not know how a log-prob is computed, how a
response is sampled or how a reward is found.
"""

from nemo_disco.algorithms.mini_batch import MiniBatch, NonFiniteError
from nemo_disco.algorithms.objectives import Objective, ObjectiveOutput, SeparableObjective, build_objective

__all__ = ["MiniBatch", "NonFiniteError", "Objective", "ObjectiveOutput", "SeparableObjective", "build_objective"]
