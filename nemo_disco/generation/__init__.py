"""Rollout engines behind one contract (engine.py), and the refit that puts the policy's weights into them.

megatron/ decodes with the policy's own weights; external/ is the client of engines in processes of their own; worker/
runs in those processes. Must not know prompts as text, grading or an objective.
"""
