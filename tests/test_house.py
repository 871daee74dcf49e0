"""The README's picture of the house is the tree, and imports run downwards in it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PACKAGE = REPO / "nemo_disco"


def pictured_rooms() -> list[str]:
    """The rooms of README.md's "The house", from above to below."""
    section = (REPO / "README.md").read_text().split("## The house", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"^    nemo_disco/(\w+)/ ", section, re.MULTILINE)


def imports(file: Path) -> Iterator[str]:
    """The modules of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def room(module: str) -> str | None:
    """The room of an imported name; None if it is none of the package's rooms."""
    parts = module.split(".")
    return parts[1] if parts[0] == "nemo_disco" and len(parts) > 1 and (PACKAGE / parts[1]).is_dir() else None


def test_the_picture_shows_each_room_once() -> None:
    rooms = pictured_rooms()
    assert sorted(rooms) == sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py"))


def test_no_import_runs_upwards() -> None:
    order = {name: height for height, name in enumerate(pictured_rooms())}
    upwards = {
        f"{file.relative_to(REPO)} imports {module}"
        for name in order
        for file in (PACKAGE / name).rglob("*.py")
        for module in imports(file)
        if (below := room(module)) is not None and order[below] < order[name]
    }
    assert not upwards


def test_objectives_are_functions_of_tensors_alone() -> None:
    """They import torch, the standard library and the two helpers for a user's own code."""
    allowed = re.compile(r"nemo_disco\.(algorithms\.objectives|runtime\.(errors|user_code))(\.|$)")
    for file in (PACKAGE / "algorithms" / "objectives").glob("*.py"):
        ours = [m for m in imports(file) if m.startswith("nemo_disco") and not re.search(allowed, m)]
        assert not [m for m in ours if m not in ("nemo_disco.runtime",)], file


def test_every_test_directory_mirrors_a_room_or_says_what_it_runs() -> None:
    others = {"benchmarks", "distributed", "docs", "end_to_end", "quickstart", "sinks", "slurm"}
    others |= {"transformers4", "triton_kernels", "vllm_engine"}
    tests = {p.name for p in (REPO / "tests").iterdir() if p.is_dir() and any(p.glob("*.py"))}
    assert tests - others <= set(pictured_rooms())
