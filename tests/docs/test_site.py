"""Every page is in the site's navigation, and every link, anchor, file and name in the documents exists."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import types
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from blocks import DOCUMENTS, REPO

sys.path.insert(0, str(REPO))

from tools import check_site

PAGES = sorted((REPO / "docs").rglob("*.md"))
ALL_DOCUMENTS = [*DOCUMENTS, *sorted(REPO.glob("C*.md")), *sorted((REPO / "benchmarks").rglob("*.md"))]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
EXTERNAL = ("http://", "https://", "mailto:")
# A file of the repository in backticks, and a name of the package.
FILE = re.compile(r"`((?:nemo_disco|tests|benchmarks|conf|slurm|tools|docs|assets)/[\w./-]*\w/?)`")
NAME = re.compile(r"`(nemo_disco(?:\.\w+)+)`")
# Examples of files that are not in the repository.
EXAMPLE_FILES = {"tools/convert/NAME.py", "conf/data/mine.yaml", "benchmarks/gpu/results/"}


def nav_pages(entry: Any) -> Iterator[str]:
    """The pages in an entry of mkdocs.yml's nav, or in the whole nav."""
    if isinstance(entry, str):
        yield entry
    for part in entry if isinstance(entry, list) else entry.values() if isinstance(entry, dict) else ():
        yield from nav_pages(part)


def anchors(page: Path) -> set[str]:
    """The anchors of a page: those that Python-Markdown makes of headings, and the names in its API blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    slugs: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
        slug = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
        slugs.add(next(s for s in (slug, *(f"{slug}_{i}" for i in range(1, 99))) if s not in slugs))
    return slugs | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


def test_the_nav_has_every_page_once_and_no_other() -> None:
    nav = yaml.safe_load((REPO / "mkdocs.yml").read_text())["nav"]
    assert sorted(nav_pages(nav)) == [str(page.relative_to(REPO / "docs")) for page in PAGES]


@pytest.mark.parametrize("document", ALL_DOCUMENTS, ids=[str(d.relative_to(REPO)) for d in ALL_DOCUMENTS])
def test_links_lead_to_files_and_anchors(document: Path) -> None:
    inside = REPO / "docs" if document in PAGES else REPO  # the site has the pages of docs/ alone
    for link in LINK.findall(document.read_text()):
        if link.startswith(EXTERNAL):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists() and target.is_relative_to(inside), f"{document.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{document.name}: {link}: {sorted(anchors(target))}"


@pytest.mark.parametrize("document", ALL_DOCUMENTS, ids=[str(d.relative_to(REPO)) for d in ALL_DOCUMENTS])
def test_files_and_names_in_the_text_exist(document: Path) -> None:
    text = document.read_text()
    for file in set(FILE.findall(text)) - EXAMPLE_FILES:
        assert (REPO / file).exists(), f"{document.name}: {file}"
    for name in {*NAME.findall(text), *re.findall(r"^::: (\S+)$", text, re.MULTILINE)}:
        resolve(name)


def resolve(name: str) -> object:
    """The module or object of a dotted name. Raises ImportError or AttributeError if there is none."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            target: object = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError as error:
            if not name.startswith(error.name or " "):
                raise
            continue
        for part in parts[count:]:
            target = getattr(target, part)
        return target
    raise ImportError(name)


@pytest.mark.parametrize(
    ("link", "problem"),
    [
        ('<a href="there.html#here">', ""),
        ('<a href="https://example.org/x#y">', ""),
        ('<a href="gone.html">', "no such file"),
        ('<a href="there.html#gone">', "no such anchor"),
        ('<a href="/there.html">', "absolute"),
        ('<script src="https://example.org/x.js"></script>', "fetched from elsewhere"),
        ('<link rel="stylesheet" href="https://example.org/x.css">', "fetched from elsewhere"),
    ],
)
def test_the_check_of_the_built_site_names_bad_links(link: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(f"<html><body>{link}</body></html>")
    (tmp_path / "there.html").write_text('<h2 id="here">Here</h2>')
    problems = list(check_site.problems(tmp_path))
    assert len(problems) == (1 if problem else 0)
    assert all(line.startswith("index.html: ") and problem in line for line in problems)


def test_a_site_that_was_not_built_has_a_problem(tmp_path: Path) -> None:
    assert list(check_site.problems(tmp_path))


def definitions(*files: Path) -> dict[str, set[str]]:
    """The names of the files' classes and functions; for a class the set has its fields and methods."""
    names: dict[str, set[str]] = {}
    for node in (node for file in files for node in ast.parse(file.read_text()).body):
        if isinstance(node, ast.ClassDef):
            fields = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
            methods = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
            names.setdefault(node.name, set()).update(fields | methods)
        elif isinstance(node, ast.FunctionDef):
            names.setdefault(node.name, set())
    return names


def is_defined(name: str, names: dict[str, set[str]]) -> bool:
    """True if `Name` or `Class.member` is among the definitions."""
    owner, _, member = name.partition(".")
    return owner in names and (not member or member in names[owner])


def test_every_name_in_the_glossary_is_defined_in_the_code() -> None:
    """The names in its last column are classes, functions, and fields or methods of a class."""
    names = definitions(*(REPO / "nemo_disco").rglob("*.py"))
    rows = re.findall(r"^\| .* \| .* \| (`.*`) \|$", (REPO / "docs/glossary.md").read_text(), re.MULTILINE)
    entries = [name for row in rows for name in re.findall(r"`([\w.]+)`", row)]
    assert len(entries) > 30
    assert not [name for name in entries if not is_defined(name, names)]


def test_a_function_is_in_the_file_that_a_document_names_beside_it() -> None:
    """Documents write such a pair as `Class.method` (`file.py`)."""
    pairs = [
        pair
        for document in ALL_DOCUMENTS
        for pair in re.findall(r"`([\w.]+)`\s+\(`(nemo_disco/[\w/]+\.py)`", document.read_text())
    ]
    assert len(pairs) > 10
    assert not [(name, file) for name, file in pairs if not is_defined(name, definitions(REPO / file))]


def test_architecture_svg_shows_every_package_once() -> None:
    names = re.findall(r'class="name"[^>]*>(\w+)/<', (REPO / "docs/architecture.svg").read_text())
    packages = {p.parent.name for p in (REPO / "nemo_disco").glob("*/__init__.py")}
    assert sorted(names) == sorted([*packages, "objectives"])


def test_docstrings_are_shown_as_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "griffe", types.SimpleNamespace(Extension=object, Object=object))
    from tools.docstrings import escape

    assert escape("w [T] = `a[i]`, a*b.\n\n    code[0]") == "w \\[T\\] = `a[i]`, a\\*b.  \n\n    code[0]"
