"""The one error for what a user can mend."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: what is wrong, where, what to do, in one line. The command line prints it and exits with 2."""
