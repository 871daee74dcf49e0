"""Graders: what a response earns. The caller's process needs the standard library alone; algebra has its own."""

from nemo_disco.rewards.math.grader import MathGrader
from nemo_disco.rewards.terms import GradedResponse, Rewards
from nemo_disco.rewards.verdict import Verdict

__all__ = ["GradedResponse", "MathGrader", "Rewards", "Verdict"]
