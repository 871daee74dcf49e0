"""Finds the program in a response: fenced blocks of Python, the likeliest first. Parses and runs nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

PYTHON = frozenset({"python", "py", "python3", "py3"})
CANDIDATES = 8  # blocks at most, counted from the end
_OPENS = re.compile(r"(?P<fence>`{3,}|~{3,})[ \t]*\{?\.?(?P<language>[A-Za-z0-9_+#-]*)(?![A-Za-z0-9_+#-])[^`~\n]*$")
_READS = re.compile(r"\binput\b|\bstdin\b|\bopen\(\s*0\b|\bfileinput\b|\bos\.read\(\s*0\b")
_DEFINES = re.compile(r"^(?:async[ \t]+)?(?:def|class)[ \t]+(\w+)|^(\w+)[ \t]*(?::[^=\n]*)?=(?!=)", re.MULTILINE)
_NAME = re.compile(r"[^\W\d]\w*")


@dataclass
class _Block:
    fence: str
    language: str
    indent: int
    lines: list[str] = field(default_factory=list)

    def closing(self, line: str) -> str | None:
        """The last line's code where the line closes this block, else None."""
        before, fence, after = line.rpartition(self.fence)
        if line.lstrip().startswith(self.fence):
            return ""
        return before.rstrip(self.fence[0]) if fence and not after.strip() else None

    @property
    def text(self) -> str:
        cut = [line[min(self.indent, len(line) - len(line.lstrip(" "))) :] for line in self.lines]
        return "\n".join(cut) + "\n"


def programs_that_read(response: str) -> list[str]:
    """Candidates for a program that reads an input, best first; the first that is Python is the answer.

    Blocks marked as Python count, or those without a mark where there is none; later ones come before earlier ones, and
    ones that read an input before ones that do not (which are often a use of the program).
    """
    blocks = _of_python(response)
    return sorted(blocks, key=lambda block: _READS.search(block) is None)


def programs_that_define(response: str, names_in: str) -> list[str]:
    """As `programs_that_read`, but first the ones that define a name which `names_in` (a name, or tests) mentions."""
    names = set(_NAME.findall(names_in))

    def lacks(block: str) -> bool:
        defined = {name for match in _DEFINES.findall(block) for name in match if name}
        return not defined & names

    return sorted(_of_python(response), key=lacks)


def _of_python(response: str) -> list[str]:
    """The last blocks first."""
    blocks = _blocks(response)
    marked = [b.text for b in blocks if b.language in PYTHON]
    texts = marked or [b.text for b in blocks if not b.language]
    return [text for text in reversed(texts) if text.strip()][:CANDIDATES]


def _blocks(response: str) -> list[_Block]:
    """All fenced blocks. The text's end closes the last one; text may stand before an opening and after a closing."""
    blocks: list[_Block] = []
    block: _Block | None = None
    for line in response.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        opening = _OPENS.search(line) if "```" in line or "~~~" in line else None
        language = opening["language"].lower() if opening else ""
        if block is not None:
            rest = block.closing(line)
            if rest is None:
                block.lines.append(line)
                continue
            block.lines += [rest] if rest.strip() else []
            block = None
            if language not in PYTHON:  # else the block was never closed, and this line opens the next
                continue
        if opening:
            block = _Block(opening["fence"], language, len(line) - len(line.lstrip(" ")))
            blocks.append(block)
    return blocks
