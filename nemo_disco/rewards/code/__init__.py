"""Rewards code that passes its question's tests (docs/rewards.md has the threat model). Three kinds of process:

the trainer's: finds the program (blocks.py), reads the tests (gold_tests.py), compares outputs (python_tests.py);
the sandbox's server, which sandbox.py starts: forks, and runs no program itself (sandbox_server.py);
a confined process, forked for one program or for tests beside it (confined_process.py, remote_names.py, nodes.py).
"""
