"""The report's scripts in a real browser, if Chromium is installed; also with 20,000 rollouts."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from nemo_disco.evaluation.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *(
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
    ),
    *("--disable-component-update", "--disable-sync", "--virtual-time-budget=10000", "--dump-dom"),
)


def render_dom(page: Path, profile: Path) -> str:
    """HTML of the page in Chromium, after its scripts have run."""
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def copy_with_colouring(page: Path, value: int, search: str = "") -> Path:
    """A copy of the page, with a script that chooses a colouring and enters a search, as a user would."""
    choose = (
        "const set = (name, value) => { const e = document.querySelector(name); e.value = value;"
        ' e.dispatchEvent(new Event(e.type === "search" ? "input" : "change")); };'
        f"set('[type=search]', {search!r}); set('[aria-label=\"colour of tokens\"]', {value});"
    )
    copy = page.with_name("chosen.html")
    copy.write_text(page.read_text().replace("</body>", f"<script>{choose}</script></body>"))
    return copy


if CHROMIUM:

    def test_curves_times_and_a_groups_responses_are_drawn(make_run: Callable[..., Path], tmp_path: Path) -> None:
        page = write_report([make_run("a"), make_run("b", lr=2e-4)], tmp_path / "page.html")
        document = render_dom(page, tmp_path / "profile")
        charts = re.findall(r'<svg [^>]*aria-label="([^"]+)"', document)
        for title in (
            "Reward",
            "Pass@1, arithmetic",
            "KL to the old policy",
            "Entropy",
            "Response length",
            "Mixed groups",
        ):
            assert title in charts
        assert charts.count("seconds of each phase by step") == 2
        assert "δ = 0.003" in document
        assert document.count('<div class="response">') == 4
        assert "&lt;b&gt;bold&lt;/b&gt; &amp;amp; &lt;/script&gt; sample 0" in document
        assert "✓ correct" in document and "✂ truncated" in document
        # Without saved token values there is nothing to colour.
        assert re.search(r'<select aria-label="colour of tokens"[^>]* hidden', document)

    def test_the_constraints_charts_are_drawn_beside_an_older_run(
        make_run: Callable[..., Path], tmp_path: Path
    ) -> None:
        page = write_report([make_run("old"), make_run("new", estimators=True)], tmp_path / "page.html")
        document = render_dom(page, tmp_path / "profile")
        charts = re.findall(r'<svg [^>]*aria-label="([^"]+)"', document)
        assert {"KL after the step", "KL after the step / δ", "KL to the old policy", "KL to the old policy, k3"} <= {
            *charts
        }
        assert {"Questions all wrong", "Never solved", "Effective sample size"} <= {*charts}

    def test_only_visible_rows_of_twenty_thousand_rollouts_are_drawn(
        make_run: Callable[..., Path], tmp_path: Path
    ) -> None:
        page = write_report([make_run(steps=50, questions=50, samples=8, tokens=True)])
        document = render_dom(copy_with_colouring(page, 2), tmp_path / "profile")
        assert "2,500 of 2,500 groups, 20,000 responses" in document
        assert 5 <= document.count('class="row"') <= 60
        assert document.count('<div class="response">') == 8
        assert 8 < document.count('title="log-ratio') < 8 * 20

    def test_tokens_are_coloured_by_log_ratio_or_weight(make_run: Callable[..., Path], tmp_path: Path) -> None:
        page = write_report([make_run(tokens=True)])
        by_ratio = render_dom(copy_with_colouring(page, 2, "bold"), tmp_path / "profile")
        first = by_ratio[by_ratio.index('<div class="response">') :].partition('<div class="response">')[2]
        first = first.partition('<div class="response">')[0]
        shades = re.findall(r'<span class="(up|down)-(\d)" title="log-ratio ([^"]+)">', first)
        assert shades[0] == ("up", "4", "+0.4") and {side for side, *_ in shades} == {"up", "down"}
        sizes = [int(shade) * (1 if side == "up" else -1) for side, shade, _ in shades]
        assert sizes == sorted(sizes, reverse=True)
        assert '<span class="end down-4" title="log-ratio \u22120.4">end</span>' in first
        assert "less likely than when sampled" in by_ratio
        # Matches of the search are marked within the coloured tokens.
        assert re.search(r'<span class="up-4"[^>]*>&lt;b&gt;<mark>bo</mark></span><span[^>]*><mark>ld</mark>', first)
        by_weight = render_dom(copy_with_colouring(page, 1), tmp_path / "profile")
        texts = re.findall(r'<div class="text"><span class="([^"]+)" title="weight ([^"]+)">', by_weight)
        assert texts == [("up-4", "+1.5"), ("down-1", "\u22120.5")] * 2
