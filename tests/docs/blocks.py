"""The commands and snippets of README and docs/, as their readers would copy them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
DOCUMENTS = [REPO / "README.md", REPO / "slurm/README.md", *sorted((REPO / "docs").glob("*.md"))]
PROGRAMS = ("nemo-disco", "make", "sbatch", "torchrun", "python", "slurm/chain.sh")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block, or lines indented by four spaces ("" is their language)."""

    document: Path
    language: str
    text: str


def blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    fenced = [Block(document, language, body) for language, body in _FENCE.findall(text)]
    plain = _FENCE.sub("\n", text)
    indented = re.findall(r"(?:^    .*\n)+", plain, re.MULTILINE)
    return fenced + [Block(document, "", re.sub(r"^    ", "", body, flags=re.MULTILINE)) for body in indented]


def commands(document: Path) -> list[str]:
    """Each command on one line; comments stay, as bash takes them. Output that is shown beside them is none."""
    lines = [
        line
        for block in blocks(document)
        if block.language in ("", "bash", "sh")
        for line in block.text.replace("\\\n", " ").splitlines()
    ]
    return [line.strip() for line in lines if line.strip().split(" ")[0].removeprefix(".venv/bin/") in PROGRAMS]


def words(command: str) -> list[str]:
    return shlex.split(command, comments=True)
