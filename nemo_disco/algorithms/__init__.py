"""The training loop, the exact gradient step, and the objectives that they maximise.

May import every package below it; the objectives import torch alone. Must not know how a log-prob or a reward is
computed, or how a response is sampled.
"""

from nemo_disco.algorithms.objectives import Objective, ObjectiveOutput, SeparableObjective, build_objective
from nemo_disco.algorithms.objectives.mini_batch import MiniBatch, NonFiniteError

__all__ = ["MiniBatch", "NonFiniteError", "Objective", "ObjectiveOutput", "SeparableObjective", "build_objective"]
