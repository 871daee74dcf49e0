"""Commands and snippets of README and docs/, as a reader would copy them, and the settings of a command."""

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
    """A fenced block, or a block of lines indented by four spaces, whose language is ""."""

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
    """Each command on one line, comments included (bash ignores them). Lines of output beside them are left out."""
    lines = [
        line
        for block in blocks(document)
        if block.language in ("", "bash", "sh")
        for line in block.text.replace("\\\n", " ").splitlines()
    ]
    return [line.strip() for line in lines if line.strip().split(" ")[0].removeprefix(".venv/bin/") in PROGRAMS]


def words(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def settings(arguments: list[str]) -> RunConfig:
    """The settings of train, evaluate, verify or plan, checked as the command would before it starts."""
    options, rest = cli._parser().parse_known_args(["plan", *arguments])
    overrides = [word for word in [*options.overrides, *rest] if word != "..."]
    assert not [word for word in overrides if word.startswith("-") or "=" not in word], overrides
    given = {word.partition("=")[0] for word in overrides}
    filled = {"model.path": "m", "data.train_files": "[q.json]"}
    more = [f"{k}={v}" for k, v in filled.items() if k not in given] if options.config_name == "config" else []
    config = compose(options.config_name, [*overrides, *more], options.config_path)
    consistency.check_consistency(config, config.trainer.devices * config.trainer.num_nodes)
    return config
