"""Graders and reward terms. sympy, users' code and responses' programs run in processes of their own."""

from nemo_disco.rewards.math.grader import MathGrader
from nemo_disco.rewards.terms import GradedResponse, Rewards
from nemo_disco.rewards.verdict import Verdict

__all__ = ["GradedResponse", "MathGrader", "Rewards", "Verdict"]
