"""From questions to rewarded rollouts: requests to the engine, early grading, rewards, and the evaluation of a set.

May touch engines, graders and question files through their contracts; must not touch the policy or an objective.
"""
