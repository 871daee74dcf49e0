"""From question files to prompts, and from responses to the plan of who runs them.

Pure and deterministic: a rank computes what every other rank computes. Touches no policy, no engine, no grader.
"""
