"""The worker: the engine's side of the wire. `python -m rollout_worker`, run by the Python of the engine's environment.

Imports only the engine, torch and the standard library, and is found through PYTHONPATH (the directory above contains
nothing else). Owns the engine, the staging memory and the refit's transaction; knows nothing of training.
"""
