"""Griffe extension for mkdocs.yml: show docstrings as the plain text that they are.

Our docstrings hold formulas, shapes and indices ([N], x[i][j], a * b, v_t), which Markdown would take for links and
emphasis; and a line that ends with a full stop ends there. Text in backticks and indented code stay Markdown. Runs in
the documentation's environment alone.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

# `code`, kept; or one of Markdown's own characters, escaped.
_CODE_OR_MARK = re.compile(r"(`+[^`]*`+)|([\\*_\[\]<>#|~])")


def escape(text: str) -> str:
    """The text with Markdown's characters escaped, except in backticks and in lines indented by four spaces."""
    return "\n".join(line if line.startswith("    ") else _escape_line(line) for line in text.split("\n"))


def _escape_line(line: str) -> str:
    escaped = _CODE_OR_MARK.sub(_escape_match, line)
    return f"{escaped}  " if line.endswith(".") else escaped  # two spaces end the line


def _escape_match(match: re.Match[str]) -> str:
    return match[1] or f"\\{match[2]}"


class PlainDocstrings(griffe.Extension):
    """Escapes every docstring when its object has been read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = escape(obj.docstring.value)
