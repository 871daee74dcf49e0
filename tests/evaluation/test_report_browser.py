"""The page in a real browser, where there is one: what its scripts make of 20,000 rollouts."""

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


def dom(page: Path, profile: Path) -> str:
    """The document after its scripts have run."""
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


if CHROMIUM:

    def test_curves_times_and_a_group_side_by_side(make_run: Callable[..., Path], tmp_path: Path) -> None:
        page = write_report([make_run("a"), make_run("b", lr=2e-4)], tmp_path / "page.html")
        seen = dom(page, tmp_path / "profile")
        charts = re.findall(r'<svg [^>]*aria-label="([^"]+)"', seen)
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
        assert "δ = 0.003" in seen
        assert seen.count('<div class="response">') == 4
        assert "&lt;b&gt;bold&lt;/b&gt; &amp;amp; &lt;/script&gt; sample 0" in seen
        assert "✓ correct" in seen and "✂ truncated" in seen

    def test_twenty_thousand_rollouts_draw_only_what_is_on_screen(
        make_run: Callable[..., Path], tmp_path: Path
    ) -> None:
        page = write_report([make_run(steps=50, questions=50, samples=8)])
        seen = dom(page, tmp_path / "profile")
        assert "2,500 of 2,500 groups, 20,000 responses" in seen
        assert 5 <= seen.count('class="row"') <= 60
        assert seen.count('<div class="response">') == 8
