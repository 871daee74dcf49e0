"""Reads the commands and snippets of README and docs/, as a reader would copy them, and checks a command's settings."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from nemo_disco import cli
from nemo_disco.config import consistency
from nemo_disco.config.compose import compose
from nemo_disco.config.schema import RunConfig

REPO = Path(__file__).resolve().parents[2]
DOCUMENTS = [REPO / "README.md", REPO / "slurm/README.md", *sorted((REPO / "docs").rglob("*.md"))]
PROGRAMS = ("nemo-disco", "make", "sbatch", "torchrun", "python", "slurm/chain.sh")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code in a document: a fenced one, or lines indented by four spaces, whose language is ""."""

    document: Path
    language: str
    text: str


def read_blocks(document: Path) -> list[Block]:
    """The document's blocks: the fenced ones, then the indented ones."""
    text = document.read_text(encoding="utf-8")
    fenced = [Block(document, language, body) for language, body in _FENCE.findall(text)]
    plain = _FENCE.sub("\n", text)
    indented = re.findall(r"(?:^    .*\n)+", plain, re.MULTILINE)
    return fenced + [Block(document, "", re.sub(r"^    ", "", body, flags=re.MULTILINE)) for body in indented]


def read_commands(document: Path) -> list[str]:
    """The document's calls of PROGRAMS, each on one line, with its comment; bash ignores comments."""
    lines = [
        line
        for block in read_blocks(document)
        if block.language in ("", "bash", "sh")
        for line in block.text.replace("\\\n", " ").splitlines()
    ]
    return [line.strip() for line in lines if line.strip().split(" ")[0].removeprefix(".venv/bin/") in PROGRAMS]


def split_command(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def check_settings(arguments: list[str]) -> RunConfig:
    """The configuration of train, evaluate, verify or plan with these arguments, checked as the command itself does."""
    options, rest = cli._parser().parse_known_args(["plan", *arguments])
    overrides = [word for word in [*options.overrides, *rest] if word != "..."]
    assert not [word for word in overrides if word.startswith("-") or "=" not in word], overrides
    keys = {word.partition("=")[0] for word in overrides}
    required = {"model.path": "m", "data.train_files": "[q.json]"}
    missing = [f"{k}={v}" for k, v in required.items() if k not in keys] if options.config_name == "config" else []
    config = compose(options.config_name, [*overrides, *missing], options.config_path)
    consistency.check_consistency(config, config.trainer.devices * config.trainer.num_nodes)
    return config
