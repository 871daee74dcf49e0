"""The engine's side of the wire: `python -m rollout_worker`, run by the Python of the engine's own environment.

Needs the engine, torch and the standard library alone, and is found through PYTHONPATH (the directory above holds
nothing else). Owns the engine, the staging memory and the refit's transaction; knows nothing of training.
"""
