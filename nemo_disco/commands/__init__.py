"""One file a command: from parsed options to the packages that do the work. Wiring; no logic of its own.

Modules here import heavy packages inside functions or are imported only when their command runs.
"""
