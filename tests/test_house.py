"""README.md's section "The house" lists each package (a "room") once, and no room imports one that stands above it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PACKAGE = REPO / "nemo_disco"


def listed_rooms() -> list[str]:
    """The packages that README.md's section "The house" lists, from top to bottom."""
    section = (REPO / "README.md").read_text().split("## The house", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"^    nemo_disco/(\w+)/ ", section, re.MULTILINE)


def imports(file: Path) -> Iterator[str]:
    """The dotted names of all modules, and of objects in them, that a file imports at any place."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def room(module: str) -> str | None:
    """The room of an imported name, such as "policy" for nemo_disco.policy.layers; None if it is not in a room."""
    parts = module.split(".")
    return parts[1] if parts[0] == "nemo_disco" and len(parts) > 1 and (PACKAGE / parts[1]).is_dir() else None


def test_the_readme_lists_each_room_once() -> None:
    rooms = listed_rooms()
    assert sorted(rooms) == sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py"))


def test_no_room_imports_a_room_above_it() -> None:
    order = {name: place for place, name in enumerate(listed_rooms())}
    upwards = {
        f"{file.relative_to(REPO)} imports {module}"
        for name in order
        for file in (PACKAGE / name).rglob("*.py")
        for module in imports(file)
        if (imported := room(module)) is not None and order[imported] < order[name]
    }
    assert not upwards


def test_objectives_are_functions_of_tensors_alone() -> None:
    """Of this package they import only each other and two modules, for errors and for users' own code."""
    allowed = re.compile(r"nemo_disco\.(algorithms\.objectives|runtime\.(errors|user_code))(\.|$)")
    for file in (PACKAGE / "algorithms" / "objectives").glob("*.py"):
        others = [m for m in imports(file) if m.startswith("nemo_disco") and not re.search(allowed, m)]
        assert not [m for m in others if m not in ("nemo_disco.runtime",)], file


def test_every_test_directory_has_the_name_of_a_room_or_is_listed_here() -> None:
    others = {"benchmarks", "distributed", "docs", "end_to_end", "quickstart", "sinks", "slurm"}
    others |= {"transformers4", "triton_kernels", "vllm_engine"}
    tests = {p.name for p in (REPO / "tests").iterdir() if p.is_dir() and any(p.glob("*.py"))}
    assert tests - others <= set(listed_rooms())
