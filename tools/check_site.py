"""Check a built documentation site without a network: every link and anchor leads somewhere, nothing is fetched.

Run from the repository: python tools/check_site.py DIRECTORY. Standard library alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Attributes that name another resource, and the elements whose resource a browser fetches by itself.
LINKS = ("href", "src", "data", "poster")
FETCHED = ("script", "img", "iframe", "object", "source", "video", "audio", "embed")


@dataclass(eq=False)
class Page(HTMLParser):
    """The anchors of a page, and its links as (element, target)."""

    anchors: set[str] = field(default_factory=set)
    links: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        fetched = tag in FETCHED or (tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload"))
        self.links += [("fetch" if fetched else "link", values[name]) for name in LINKS if name in values]


def read_page(file: Path) -> Page:
    page = Page()
    page.feed(file.read_text(encoding="utf-8"))
    page.close()
    return page


def problems(site: Path) -> Iterator[str]:
    """One line for each link, anchor or resource that fails. 404.html is left out: its links are a server's."""
    files = sorted(file for file in site.rglob("*.html") if file.name != "404.html")
    pages = {file.resolve(): read_page(file) for file in files}
    if not pages:
        yield f"{site}: no page in it; build the site first"
    for file, page in pages.items():
        for kind, link in page.links:
            if problem := check_link(file, kind, link, pages):
                yield f"{file.relative_to(site.resolve())}: {link}: {problem}"


def check_link(file: Path, kind: str, link: str, pages: dict[Path, Page]) -> str:
    """The reason why a link of a page fails; an empty string if it works."""
    parts = urlsplit(link)
    if parts.scheme == "data" or (kind == "link" and parts.scheme in ("http", "https", "mailto")):
        return ""
    if parts.scheme or parts.netloc:
        return "is fetched from elsewhere, and the site must work offline"
    if parts.path.startswith("/"):
        return "is absolute, and works only at the root of a server"
    target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
    if not target.is_file():
        return "no such file"
    if parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
        return "no such anchor"
    return ""


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python tools/check_site.py DIRECTORY", file=sys.stderr)
        return 2
    failures = list(problems(Path(arguments[0])))
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
