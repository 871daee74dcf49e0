"""PNG plots, the CSV, and the page that is rewritten while a run goes on."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_disco import cli
from nemo_disco.evaluation import report
from nemo_disco.evaluation.plots import write_plots


def test_plots_and_csv_of_two_runs(make_run: Callable[..., Path], tmp_path: Path) -> None:
    runs = [make_run("a", steps=5), make_run("b", steps=3)]
    paths = write_plots(runs, tmp_path / "plots")
    names = {path.name for path in paths}
    assert names >= {"metrics.csv", "reward_mean.png", "policy_kl.png", "grad_norm.png", "pass1_arithmetic.png"}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths if p.suffix == ".png")
    with (tmp_path / "plots/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    rewards = {(r["run"], int(r["step"])): float(r["value"]) for r in rows if r["metric"] == "reward/mean"}
    assert rewards[("a", 5)] == 0.3 + 0.005 * 5 and len(rewards) == 8
    assert not [r for r in rows if r["metric"] == "grad_norm" and r["step"] == "3"]  # null there


def test_plots_of_new_metrics_beside_an_older_run(make_run: Callable[..., Path], tmp_path: Path) -> None:
    paths = write_plots([make_run("old", steps=5), make_run("new", steps=5, estimators=True)], tmp_path / "plots")
    names = {path.name for path in paths}
    assert names >= {"policy_kl_after.png", "policy_kl_k3.png", "policy_kl.png", "groups_never_solved.png"}
    with (tmp_path / "plots/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    after = {(r["run"], int(r["step"])): float(r["value"]) for r in rows if r["metric"] == "policy/kl_after"}
    assert sorted(after) == [("new", step) for step in (1, 3, 4, 5)] and after[("new", 5)] == 2e-4 * 5
    assert not [r for r in rows if r["metric"] in ("constraint/by_mini_batch", "mismatch/worst_tokens")]


def test_the_report_command_writes_plots_and_page(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(steps=3)
    assert cli.main(["report", str(run), "--plots", str(tmp_path / "plots")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert str(tmp_path / "plots/metrics.csv") in printed and printed[-1] == str(run / "report.html")


def test_watch_rewrites_the_page_when_the_run_changes(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, page = make_run(steps=3), None
    texts: list[str] = []

    def sleep(_: float) -> None:
        nonlocal page
        page = run / "report.html"
        texts.append(page.read_text())
        page.unlink()
        if len(texts) == 1:
            with (run / "metrics.jsonl").open("a") as file:
                file.write('{"step": 4, "reward/mean": 0.777123}\n')
        elif len(texts) == 2:
            page.write_text("nothing new")
        else:
            raise KeyboardInterrupt

    monkeypatch.setattr(report.time, "sleep", sleep)
    assert report.watch([run], None) == 0
    assert "0.777123" not in texts[0] and "0.777123" in texts[1] and texts[2] == "nothing new"
    assert 'http-equiv="refresh"' in texts[1] and 'http-equiv="refresh"' not in (run / "report.html").read_text()
