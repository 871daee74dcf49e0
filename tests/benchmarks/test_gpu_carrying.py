"""Files for a GPU machine: packages in pieces that arrive in any order, an engine's Python, and questions."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"
sys.path.insert(0, str(GPU))

import pack  # noqa: E402 - a script's directory, not a package
import smol  # noqa: E402
import unpack  # noqa: E402


def test_pieces_become_the_folder_again_once_all_are_there(tmp_path: Path) -> None:
    folder, carry = tmp_path / "folder", tmp_path / "carry"
    (folder / "site" / "package").mkdir(parents=True)
    (folder / "site" / "package" / "code.py").write_text("x = 1\n")
    (folder / "data").write_bytes(os.urandom(5000))
    pieces = pack.split_into_pieces("set", folder, carry, 1500)
    assert len(pieces) >= 4 and all(sum(f.stat().st_size for f in p.iterdir()) < 1600 for p in pieces)
    store = tmp_path / "store"
    late = tmp_path / "late"
    late.mkdir()
    pieces[1].rename(late / pieces[1].name)
    (line,) = unpack.unpack(carry, store)
    assert line.startswith("set: not unpacked") and line.endswith(f"{len(pieces) - 1} are here")
    assert unpack.unpack(late, store) == [f"set: unpacked to {store / 'set'}"]
    for file in ("site/package/code.py", "data"):
        assert (store / "set" / file).read_bytes() == (folder / file).read_bytes()
    assert unpack.unpack(late, store) == []


def test_a_damaged_piece_is_not_unpacked(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "data").write_bytes(os.urandom(5000))
    piece = pack.split_into_pieces("set", folder, tmp_path / "carry", 1500)[1]
    file = next(piece.iterdir())
    file.write_bytes(file.read_bytes()[::-1])
    assert "not unpacked" in unpack.unpack(tmp_path / "carry", tmp_path / "store")[0]


def test_an_engines_python_finds_torch_and_what_was_carried(tmp_path: Path) -> None:
    """PYTHONPATH is not set, as when a run starts its engine."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "carried_package.py").write_text("import torch\n")
    command = [sys.executable, str(GPU / "engine_python.py"), str(tmp_path / "engine"), str(tmp_path / "site")]
    subprocess.run(command, check=True, capture_output=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    python = str(tmp_path / "engine" / "bin" / "python")
    subprocess.run([python, "-c", "import carried_package"], check=True, env=environment)


def test_questions_differ_and_are_answered() -> None:
    questions = smol.make_questions(600)
    assert len({q["problem"] for q in questions}) == 600
    sums = [q for q in questions if "buys" in q["problem"] and "loses" not in q["problem"]]
    for q in sums:
        numbers = [int(word) for word in q["problem"].replace(".", " ").split() if word.isdigit()]
        assert int(q["answer"]) == sum(numbers)
    assert sums


@pytest.mark.parametrize("script", ["engine_python.py", "smol.py"])
def test_a_script_without_arguments_says_how_it_is_called(script: str) -> None:
    process = subprocess.run([sys.executable, str(GPU / script)], capture_output=True, text=True)
    assert process.returncode == 1 and process.stderr.startswith("usage: ") and "Traceback" not in process.stderr


def test_the_wheels_that_are_carried_are_what_setup_asks_for() -> None:
    """pack.py repeats the versions, because it must run without the project's environment."""
    tree = ast.parse((GPU.parents[1] / "setup.py").read_text())
    (requirements,) = (k.value for k in ast.walk(tree) if isinstance(k, ast.keyword) and k.arg == "install_requires")
    allowed = {r.name: r.specifier for r in map(Requirement, ast.literal_eval(requirements))}
    versions = {r.name: next(iter(r.specifier)).version for r in map(Requirement, pack.BASE)}
    shared = allowed.keys() & versions.keys()
    assert shared >= {"megatron-core", "hydra-core", "omegaconf", "pydantic", "math-verify"}
    assert {name for name in shared if versions[name] not in allowed[name]} == set()
