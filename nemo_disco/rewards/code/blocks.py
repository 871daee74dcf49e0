"""Finds candidates for the program in a response: its fenced Python blocks, likeliest first. Parses and runs none."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

PYTHON = frozenset({"python", "py", "python3", "py3"})
MAX_CANDIDATES = 8  # blocks, counted from the end
_OPENING = re.compile(r"(?P<fence>`{3,}|~{3,})[ \t]*\{?\.?(?P<language>[A-Za-z0-9_+#-]*)(?![A-Za-z0-9_+#-])[^`~\n]*$")
_READS_INPUT = re.compile(r"\binput\b|\bstdin\b|\bopen\(\s*0\b|\bfileinput\b|\bos\.read\(\s*0\b")
_DEFINITION = re.compile(r"^(?:async[ \t]+)?(?:def|class)[ \t]+(\w+)|^(\w+)[ \t]*(?::[^=\n]*)?=(?!=)", re.MULTILINE)
_NAME = re.compile(r"[^\W\d]\w*")


@dataclass
class _Block:
    fence: str
    language: str
    indent: int
    lines: list[str] = field(default_factory=list)

    def code_before_fence(self, line: str) -> str | None:
        """The code before the closing fence if the line closes this block, else None."""
        before, fence, after = line.rpartition(self.fence)
        if line.lstrip().startswith(self.fence):
            return ""
        return before.rstrip(self.fence[0]) if fence and not after.strip() else None

    @property
    def text(self) -> str:
        dedented = [line[min(self.indent, len(line) - len(line.lstrip(" "))) :] for line in self.lines]
        return "\n".join(dedented) + "\n"


def find_reading_programs(response: str) -> list[str]:
    """Candidates for a program that reads an input, best first; the first that is valid Python is the program.

    Only blocks marked as Python count, or all unmarked blocks if none is marked. Later blocks come before earlier ones,
    and blocks that read an input before all that do not (those are often examples of the program's use).
    """
    blocks = _python_blocks(response)
    return sorted(blocks, key=lambda block: _READS_INPUT.search(block) is None)


def find_defining_programs(response: str, tests: str) -> list[str]:
    """As `find_reading_programs`, but first the blocks that define a name used in `tests` (source, or just a name)."""
    names = set(_NAME.findall(tests))

    def defines_none(block: str) -> bool:
        defined = {name for match in _DEFINITION.findall(block) for name in match if name}
        return not defined & names

    return sorted(_python_blocks(response), key=defines_none)


def _python_blocks(response: str) -> list[str]:
    """The texts of the last MAX_CANDIDATES Python blocks, last first."""
    blocks = _split_blocks(response)
    marked = [b.text for b in blocks if b.language in PYTHON]
    texts = marked or [b.text for b in blocks if not b.language]
    return [text for text in reversed(texts) if text.strip()][:MAX_CANDIDATES]


def _split_blocks(response: str) -> list[_Block]:
    """All fenced blocks; the response's end closes an open one. A fence's line may begin or end with other text."""
    blocks: list[_Block] = []
    block: _Block | None = None
    for line in response.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        opening = _OPENING.search(line) if "```" in line or "~~~" in line else None
        language = opening["language"].lower() if opening else ""
        if block is not None:
            code = block.code_before_fence(line)
            if code is None:
                block.lines.append(line)
                continue
            block.lines += [code] if code.strip() else []
            block = None
            if language not in PYTHON:  # else the block was left open, and this line opens the next
                continue
        if opening:
            block = _Block(opening["fence"], language, len(line) - len(line.lstrip(" ")))
            blocks.append(block)
    return blocks
