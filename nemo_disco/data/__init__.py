"""Questions and rollouts as data: question files to prompts, rollouts, and the packing plan of a mini-batch.

Pure and deterministic: every rank computes the same. Uses no policy, no engine and no grader.
"""
