"""The commands of README and docs/ work: bash parses all, settings are checked, and quick ones run. Snippets run too.

test_documented_runs.py runs the commands that train.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import types
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from blocks import DOCUMENTS, REPO, check_settings, read_blocks, read_commands, split_command

from nemo_disco import cli
from nemo_disco.algorithms.objectives.registry import OBJECTIVES

ALL = [(document, command) for document in DOCUMENTS for command in read_commands(document)]
IDS = [f"{document.stem}-{i}" for i, (document, _) in enumerate(ALL)]


@pytest.mark.parametrize(("document", "command"), ALL, ids=IDS)
def test_bash_parses_the_command(document: Path, command: str) -> None:  # noqa: ARG001 - in the test's id
    subprocess.run(["bash", "-n", "-c", command], check=True)


@pytest.mark.parametrize(("document", "command"), ALL, ids=IDS)
def test_the_settings_of_the_command_are_valid(document: Path, command: str, directory: Path) -> None:  # noqa: ARG001
    program, *arguments = split_command(command)
    if program == "nemo-disco" and arguments[0] in cli.CONFIG_COMMANDS:
        check_settings(arguments[1:])
    elif program in ("sbatch", "slurm/chain.sh"):
        script = next(i for i, word in enumerate(arguments) if word.endswith(".sbatch"))
        assert (REPO / arguments[script]).is_file()
        if "convert" not in arguments[script]:
            check_settings(arguments[script + 1 :])
    elif program == "torchrun":
        check_settings(arguments[arguments.index("train") + 1 :])
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in arguments if "=" not in word} <= set(targets)


RUN_HERE = ("data", "grade", "report", "doctor", "plan")
QUICK = [
    (d, c)
    for d, c in ALL
    if split_command(c)[0] == "nemo-disco" and split_command(c)[1] in RUN_HERE and "--watch" not in c
]
QUICK_IDS = [f"{d.stem}-{split_command(c)[1]}-{i}" for i, (d, c) in enumerate(QUICK)]


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("command", [c for _, c in QUICK], ids=QUICK_IDS)
def test_a_quick_command_runs(command: str, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [sorted(map(str, directory.glob(word))) if "*" in word else [word] for word in split_command(command)[1:]]
    arguments = [word for expansion in words for word in expansion]
    assert cli.main(arguments) in ((0, 1) if arguments[0] == "doctor" else (0,)), capsys.readouterr().err


PYTHON = [(d, [b.text for b in read_blocks(d) if b.language == "python"]) for d in DOCUMENTS]
PYTHON = [(d, texts) for d, texts in PYTHON if texts]


@pytest.mark.parametrize(("document", "snippets"), PYTHON, ids=[d.stem for d, _ in PYTHON])
@pytest.mark.usefixtures("directory")
def test_the_snippets_of_a_document_run_one_after_another(
    document: Path, snippets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType(f"snippets_of_{document.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look up the module of their class there
    ones = torch.ones(3)
    vars(module).update(torch=torch, log_probs=-ones, old_log_probs=-ones, lengths=torch.tensor([2, 1]))
    vars(module).update(question_ids=torch.tensor([0, 0]), rewards=torch.tensor([1.0, 0.0]))
    for snippet in snippets:
        exec(compile(snippet, str(document), "exec"), vars(module))


def test_the_records_in_data_md_are_read_as_questions(directory: Path) -> None:
    from nemo_disco.data.questions import load_questions

    [text] = [block.text for block in read_blocks(REPO / "docs/data.md") if block.language == "json"]
    (directory / "records.jsonl").write_text(text)
    assert [q.answers for q in load_questions([directory / "records.jsonl"]).questions] == [
        ("42",), ("2", "-2"), ("42",), ("42",), ("42",), ("42",)
    ]  # fmt: skip


def test_the_tables_of_algorithms_md_name_every_objective_and_only_existing_parameters() -> None:
    rows = re.findall(r"^\| `(\w+)` \|(?:.*) \|(.*) \|$", (REPO / "docs/algorithms.md").read_text(), re.MULTILINE)
    tables = {name: re.findall(r"`(\w+)`", last) for name, last in rows if name in OBJECTIVES}
    assert set(tables) == set(OBJECTIVES)
    for name, parameters in tables.items():
        assert set(parameters) <= {field.name.rstrip("_") for field in fields(OBJECTIVES[name])}, name


# The suffixes that docs/model.md quotes, unquoted.
SUFFIXES = [
    " Put the final answer in \\boxed{}.",
    " Let's think step by step.",
    "\nPut the final answer in a box.",
    "",
]


def test_a_suffix_that_is_quoted_as_in_model_md_arrives_unchanged() -> None:
    """It passes through bash, as at a prompt or after the name of an sbatch script, and through Hydra."""
    cells = re.findall(
        r"^\| .* \| `(.*data\.prompt_suffix=.*)` \|$", (REPO / "docs/model.md").read_text(), re.MULTILINE
    )
    command = ["bash", "-c", f"printf '%s\\0' {' '.join(cells)}"]
    words = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")[:-1]
    suffixes = [check_settings(["--config-name", "recipe/disco_logl_1.5b", word]).data.prompt_suffix for word in words]
    assert suffixes == SUFFIXES


@pytest.mark.slow
def test_the_converters_of_cluster_md_run(directory: Path) -> None:
    shutil.copytree(REPO / "assets/quickstart/model", directory / "models/mine")
    for command in read_commands(REPO / "docs/cluster.md"):
        program, *arguments = split_command(command)
        if program == "python":
            script = REPO / "tools/convert" / f"{arguments[1].rpartition('.')[2]}.py"
            run_python(["python", str(script), *arguments[2:]])
    file_names = [sorted(f.name for f in (directory / d).iterdir()) for d in ("models/mine", "back", "again")]
    assert file_names[0] == file_names[1] == file_names[2]


def run_python(command: list[str]) -> None:
    """Run `python ...` with this interpreter and the repository's package."""
    subprocess.run([sys.executable, *command[1:]], check=True, env=os.environ | {"PYTHONPATH": str(REPO)})
