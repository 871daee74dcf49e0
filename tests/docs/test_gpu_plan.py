"""The commands in benchmarks/gpu/thirty_minutes.md are valid, so that none is refused during the minutes on a GPU."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from nemo_disco.config.compose import compose
from nemo_disco.config.consistency import check_consistency

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))

import pack  # noqa: E402 - a script's directory, not a package
import section  # noqa: E402

TEXT = (ROOT / "benchmarks" / "gpu" / "thirty_minutes.md").read_text()
BLOCKS = [block.replace("\\\n", " ") for block in re.findall(r"(?:^    .*\n)+", TEXT, re.M)]
LONGEST = 2000  # the limit of the GPU machine, in characters of a command


def read_runs() -> list[list[str]]:
    """The arguments of each `python3 -m nemo_disco train` and `verify`, with the shell's variables filled in."""
    commands = []
    for block in BLOCKS:
        shared = re.search(r'Q="([^"]*)"', block)
        for template in re.findall(r"python3 -m nemo_disco (?:train|verify) (.*?) 2>&1", block, re.S):
            for name, setting in (("disco", "algorithm.score=log_likelihood"), ("grpo", "")):
                line = template.replace("$Q", shared.group(1) if shared else "").replace("${2:-}", setting)
                commands.append(shlex.split(line.replace("$1", name)))
    return commands


@pytest.mark.parametrize("words", read_runs(), ids=lambda words: " ".join(words)[-40:])
def test_the_settings_of_a_run_are_valid(words: list[str]) -> None:
    name = words.pop(words.index("--config-name") + 1)
    overrides = [word for word in words if "=" in word]
    check_consistency(compose(name, overrides), 1)


def test_the_sections_file_sets_and_scripts_exist_and_commands_are_short_enough() -> None:
    assert len(read_runs()) == 6
    only = [name for block in BLOCKS for names in re.findall(r"--only ([\w\s]+)", block) for name in names.split()]
    assert len(only) > 10 and set(only) <= set(section.SECTIONS)
    packed = re.search(r"pack\.py ([\w ]+)", TEXT)
    assert packed and set(packed.group(1).split()) <= {"base", *pack.BUILDERS}
    for block in BLOCKS:
        assert len(block) < LONGEST
    for script in set(re.findall(r"benchmarks/gpu/\w+\.py", TEXT)):
        assert (ROOT / script).exists()
