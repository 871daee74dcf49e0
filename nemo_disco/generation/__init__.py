"""Rollout engines behind one contract (engine.py), and the refit that puts the policy's weights into them.

megatron/ samples from the policy's own modules; external/ is the client of engines in processes of their own; worker/
runs in those processes. Must not know prompts as text, grading or an objective.
"""
