"""Finds what a setting names as `module:attribute`: a user's objective, verifier or function.

Imports the user's module and nothing else.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from nemo_disco.runtime.errors import UserError


def load(key: str, name: str) -> Any:
    """What `module:attribute` names; modules are also looked for in the working directory.

    key: the setting, for messages. Raises UserError.
    """
    module_name, _, attribute = name.partition(":")
    # An installed command, unlike `python -m`, does not search the directory that it is run in.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(f"{key}={name}: importing {module_name} raised {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        raise UserError(f"{key}={name}: {module.__file__} has no {attribute!r}")
    return getattr(module, attribute)
