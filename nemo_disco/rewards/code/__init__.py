"""Rewards code that passes its question's tests; docs/data.md has the threat model. Three processes:

the trainer's (python_tests.py) finds the program, reads the tests and compares outputs, and starts through sandbox.py
a server (sandbox_server.py) that runs no program itself and forks, for each program and each script of tests,
a confined process (confined_process.py) that computes and prints, and whatever else it tries the kernel refuses.
"""
