"""Every command of README and docs/ works: quick ones run, those that train are composed and checked, and bash reads
all of them. Every Python snippet runs."""

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
from blocks import DOCUMENTS, REPO, blocks, commands, settings, words

from nemo_disco import cli
from nemo_disco.algorithms.objectives.registry import OBJECTIVES

ALL = [(document, command) for document in DOCUMENTS for command in commands(document)]
IDS = [f"{document.stem}-{i}" for i, (document, _) in enumerate(ALL)]


@pytest.mark.parametrize(("document", "command"), ALL, ids=IDS)
def test_bash_reads_it(document: Path, command: str) -> None:  # noqa: ARG001 - the id
    subprocess.run(["bash", "-n", "-c", command], check=True)


@pytest.mark.parametrize(("document", "command"), ALL, ids=IDS)
def test_its_settings_hold_together(document: Path, command: str, place: Path) -> None:  # noqa: ARG001
    program, *arguments = words(command)
    if program == "nemo-disco" and arguments[0] in cli.CONFIG_COMMANDS:
        settings(arguments[1:])
    elif program in ("sbatch", "slurm/chain.sh"):
        at = next(i for i, word in enumerate(arguments) if word.endswith(".sbatch"))
        assert (REPO / arguments[at]).is_file()
        if "convert" not in arguments[at]:
            settings(arguments[at + 1 :])
    elif program == "torchrun":
        settings(arguments[arguments.index("train") + 1 :])
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in arguments if "=" not in word} <= set(targets)


RUN_HERE = ("data", "grade", "report", "doctor", "plan")
QUICK = [(d, c) for d, c in ALL if words(c)[0] == "nemo-disco" and words(c)[1] in RUN_HERE and "--watch" not in c]


QUICK_IDS = [f"{d.stem}-{words(c)[1]}-{i}" for i, (d, c) in enumerate(QUICK)]


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("command", [c for _, c in QUICK], ids=QUICK_IDS)
def test_it_runs(command: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [sorted(map(str, place.glob(word))) if "*" in word else [word] for word in words(command)[1:]]
    arguments = [word for expanded in given for word in expanded]
    assert cli.main(arguments) in ((0, 1) if arguments[0] == "doctor" else (0,)), capsys.readouterr().err


PYTHON = [(d, [b.text for b in blocks(d) if b.language == "python"]) for d in DOCUMENTS]
PYTHON = [(d, texts) for d, texts in PYTHON if texts]


@pytest.mark.parametrize(("document", "snippets"), PYTHON, ids=[d.stem for d, _ in PYTHON])
@pytest.mark.usefixtures("place")
def test_the_snippets_of_a_document_run_one_after_another(
    document: Path, snippets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType(f"snippets_of_{document.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses look for their class's module
    ones = torch.ones(3)
    vars(module).update(torch=torch, log_probs=-ones, old_log_probs=-ones, lengths=torch.tensor([2, 1]))
    vars(module).update(question_ids=torch.tensor([0, 0]), rewards=torch.tensor([1.0, 0.0]))
    for snippet in snippets:
        exec(compile(snippet, str(document), "exec"), vars(module))


def test_the_records_of_data_md_are_questions(place: Path) -> None:
    from nemo_disco.data.questions import load_questions

    [text] = [block.text for block in blocks(REPO / "docs/data.md") if block.language == "json"]
    (place / "records.jsonl").write_text(text)
    assert [q.answers for q in load_questions([place / "records.jsonl"]).questions] == [
        ("42",), ("2", "-2"), ("42",), ("42",), ("42",), ("42",)
    ]  # fmt: skip


def test_the_tables_of_algorithms_md_name_every_objective_and_parameters_that_it_has() -> None:
    rows = re.findall(r"^\| `(\w+)` \|(?:.*) \|(.*) \|$", (REPO / "docs/algorithms.md").read_text(), re.MULTILINE)
    tables = {name: re.findall(r"`(\w+)`", last) for name, last in rows if name in OBJECTIVES}
    assert set(tables) == set(OBJECTIVES)
    for name, parameters in tables.items():
        assert set(parameters) <= {field.name.rstrip("_") for field in fields(OBJECTIVES[name])}, name


QUOTED = [
    " Put the final answer in \\boxed{}.",
    " Let's think step by step.",
    "\nPut the final answer in a box.",
    "",
]


def test_a_suffix_quoted_as_model_md_says_arrives_as_it_is() -> None:
    """Through bash, as typed at a prompt or after the script's name in sbatch, and through Hydra."""
    cells = re.findall(
        r"^\| .* \| `(.*data\.prompt_suffix=.*)` \|$", (REPO / "docs/model.md").read_text(), re.MULTILINE
    )
    command = ["bash", "-c", f"printf '%s\\0' {' '.join(cells)}"]
    words = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")[:-1]
    suffixes = [settings(["--config-name", "recipe/disco_logl_1.5b", word]).data.prompt_suffix for word in words]
    assert suffixes == QUOTED


@pytest.mark.slow
def test_the_converters_of_cluster_md_run(place: Path) -> None:
    shutil.copytree(REPO / "assets/quickstart/model", place / "models/mine")
    for command in commands(REPO / "docs/cluster.md"):
        program, *arguments = words(command)
        if program == "python":
            script = REPO / "tools/convert" / f"{arguments[1].rpartition('.')[2]}.py"
            run(["python", str(script), *arguments[2:]])
    names = [sorted(f.name for f in (place / d).iterdir()) for d in ("models/mine", "back", "again")]
    assert names[0] == names[1] == names[2]


def run(command: list[str]) -> None:
    subprocess.run([sys.executable, *command[1:]], check=True, env=os.environ | {"PYTHONPATH": str(REPO)})
