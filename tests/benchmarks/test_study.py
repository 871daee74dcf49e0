"""The study's queue ends, resumes and pauses; its report says what its runs say. How well methods learn is not here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from study_records import all_of, made_up

from benchmarks.study import claims, prepare, report, statistics, tables, task, work_queue
from benchmarks.study import grid as grids
from benchmarks.study.objectives import PerMicroBatch
from benchmarks.study.runs import Runs
from nemo_disco.algorithms import MiniBatch, build_objective
from nemo_disco.commands.checks import check_objective
from nemo_disco.config.compose import compose
from nemo_disco.config.consistency import check_consistency
from tools.quickstart import warm_start

REPO = Path(__file__).parents[2]
GRID = grids.load()


@pytest.mark.slow
def test_every_item_of_the_grid_is_a_run_that_the_product_takes(tmp_path: Path) -> None:
    items = grids.items(GRID)
    assert len({item.name for item in items}) == len(items)
    assert items[0].part == grids.BASE
    assert [i.seed for i in items if i.part == grids.MAIN] == sorted(i.seed for i in items if i.part == grids.MAIN)
    for item in {item.overrides: item for item in items}.values():
        name, config_path, *overrides = item.arguments(tmp_path, 1e-3)[1::2][:2] + item.arguments(tmp_path, 1e-3)[4:]
        config = compose(name, [*overrides, f"exp_manager.explicit_log_dir={tmp_path}"], config_path)
        check_consistency(config, 1)
        check_objective(config)
        assert Path(config.evaluation.files[0]).stem == ("development" if item.part == grids.TUNING else "test")


def test_the_learning_rate_is_the_best_of_all_or_none_yet() -> None:
    tuned = [i for i in grids.items(GRID) if i.part == grids.TUNING and i.method == "grpo"]
    accuracies = (0.2, 0.8, 0.5)
    records = [made_up(item, accuracy) for item, accuracy in zip(tuned, accuracies, strict=True)]
    assert grids.best_learning_rate("grpo", records[:2], 3) is None
    assert grids.best_learning_rate("grpo", records, 3) == tuned[1].learning_rate
    records[1]["failed"] = "diverged"
    assert grids.best_learning_rate("grpo", records, 3) == tuned[2].learning_rate


def test_no_held_out_question_is_trained_on() -> None:
    test, development, train, supervised = prepare.splits(warm_start.Recipe(batch=8, max_steps=100))
    held_out = {p.numbers for p in (*test, *development)}
    assert len(held_out) == 2 * prepare.HELD_OUT
    assert not held_out & {p.numbers for p in (*train, *supervised)}


def test_a_worked_solution_is_right_however_it_is_worked() -> None:
    styles = {task.Problem((7, 2, 9, 4), "", style).solution for style in range(50)}
    assert len(styles) > 4
    for solution in styles:
        *steps, think, box = solution.splitlines()
        assert think == "</think>" and box == "\\boxed{22}"
        assert all(eval(step.replace("=", "==")) for step in steps)


def mini_batch(seed: int, questions: int) -> MiniBatch:
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (questions * 4,), generator=rng)
    old = -torch.rand(int(lengths.sum()), generator=rng).double()
    moved = old - 0.3 * torch.rand(len(old), generator=rng).double()
    rewards = (torch.arange(questions * 4) % 4 < 2).double()
    ids = torch.arange(questions).repeat_interleave(4)
    return MiniBatch(moved, old, lengths, ids, rewards, max_response_length=9)


def test_per_micro_batch_is_disco_where_there_is_one_and_the_mean_of_their_penalties_where_there_are_more() -> None:
    exact = build_objective({"name": "disco", "constraint": {"delta": 0.01, "beta": 7.0}})
    batch = mini_batch(0, questions=4)
    whole, halves = (PerMicroBatch(beta=7.0, delta=0.01, questions=n)(batch) for n in (4, 2))
    torch.testing.assert_close(whole.loss, exact(batch).loss)
    torch.testing.assert_close(whole.token_weights, exact(batch).token_weights)
    ends = int(batch.lengths[:8].sum())
    moved = batch.old_log_probs - batch.log_probs
    penalties = [7.0 * max(float(part.mean()) - 0.01, 0) ** 2 for part in (moved[:ends], moved[ends:])]
    free = build_objective({"name": "disco", "constraint": {"kind": "none"}})(batch).loss
    assert float(halves.loss - free) == pytest.approx(sum(penalties) / 2, rel=1e-9)


def test_a_difference_is_by_question_and_over_common_seeds() -> None:
    a = {1: np.array([1.0, 0.5]), 2: np.array([0.5, 0.5]), 3: np.array([0.0, 0.0])}
    b = {1: np.array([0.5, 0.0]), 2: np.array([0.0, 0.0])}
    found = statistics.difference(a, b)
    assert found is not None and (found.value, found.low, found.high) == (0.5, 0.5, 0.5)
    assert statistics.difference({1: a[1]}, {2: b[2]}) is None
    assert statistics.aes(0.8, 60, 0.8, 100) == pytest.approx(0.4)
    assert statistics.aes(0.72, 50, 0.8, 100) == pytest.approx(0.5 - 1.0)


def test_the_report_says_what_the_runs_say(tmp_path: Path) -> None:
    accuracies = {"disco_logl": 0.9, "grpo": 0.3, "grpo_rw": 0.3, "disco_b_lratio.clip_0.2": 0.95}
    records = all_of(GRID, accuracies)
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    page = report.write(tmp_path).read_text()
    assert "Nothing was cut" in page
    ablated = len(GRID["ablations"]["seeds"])
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in page.splitlines() if line.startswith("| ")}
    assert rows["DisCO log-L above GRPO"].endswith("| 5 | holds |")
    assert rows["not clipping is better than 0.2, 0.2"].endswith(f"| {ablated} | the opposite |")
    assert rows["dividing GRPO's question weight out (GRPO_RW) is better"].endswith("| 5 | not decided |")
    figures = {path.name for path in tmp_path.glob("*.png")}
    assert figures == {"curves.png", "kl.png", "wins.png", "ablations.png", "lengths.png"}
    assert all(f"({name})" in page for name in figures)


def test_a_study_that_was_cut_says_so_and_decides_nothing_by_one_seed() -> None:
    records = [
        r for r in all_of(GRID, {"disco_logl": 0.9, "grpo": 0.2}) if r["part"] != grids.LENGTH and r["seed"] != 2
    ]
    cut = Runs([r for r in records if r["seed"] in (1, GRID["tuning"]["seed"])], GRID)
    assert f"length: 0 of {cut.planned(grids.LENGTH)} runs" in report._cut(cut)
    assert "| 1 | one seed: not decided |" in claims.table(cut)
    assert "| not run |" in claims.table(Runs([r for r in cut.records if r["part"] == grids.MAIN], GRID))
    assert "holds" not in claims.table(cut)
    assert tables.length_points(cut).keys() <= {"GRPO", "DisCO log-L"}


TINY = """
run: [trainer.max_steps=2, data.questions_per_step=4, algorithm.mini_batch_questions=2, evaluation.samples=2]
methods:
  grpo: {label: GRPO, overrides: [algorithm=grpo]}
tuning: {learning_rates: [1e-3], seed: 7}
main: {seeds: [1]}
"""


# At its own priority a run would never end beside other tests.
START = """
from benchmarks.study import __main__, processes
processes.lower = lambda pid: None
__main__.main()
"""


def start(work: Path, grid: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", START, "run", str(work), "--grid", str(grid), "--jobs=1"]
    return subprocess.Popen(command, cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_two_items_through_pause_end_resume_and_report(tmp_path: Path) -> None:
    work, grid = tmp_path / "work", tmp_path / "grid.yaml"
    grid.write_text(TINY)
    work.mkdir()
    prepare.prepare(work, warm_start.Recipe(batch=4, check_from=1, check_every=1, stop_at=0.0, max_steps=1))
    assert load_file(work / "model" / "model.safetensors")
    (work / "pause").touch()
    paused = start(work, grid)
    time.sleep(15)
    assert paused.poll() is None and not [*(work / "logs").glob("*")], "nothing starts while it is paused"
    (work / "pause").unlink()
    tuned = work / "results" / "tuning.grpo.lr_0.001.seed_7.json"
    while not tuned.exists():
        assert paused.poll() is None, [p.read_text() for p in (work / "logs").glob("*")]
        time.sleep(0.2)
    paused.send_signal(signal.SIGTERM)
    assert paused.wait(60) == 1
    (work / "results" / "main.grpo.seed_1.json").unlink(missing_ok=True)
    before = tuned.stat().st_mtime_ns
    assert start(work, grid).wait(300) == 0
    assert tuned.stat().st_mtime_ns == before, "what is there is not run again"
    record = json.loads((work / "results" / "main.grpo.seed_1.json").read_text())
    assert record["learning_rate"] == 1e-3 and len(record["curve"]["reward"]) == 2
    assert len(record["evaluation"]["correct"]) == prepare.HELD_OUT and not [*(work / "runs").iterdir()]
    page = report.write(tmp_path / "out", work).read_text()
    assert "3 runs" in page and (tmp_path / "out" / "curves.png").exists()


def test_an_item_whose_learning_rate_is_not_known_waits(tmp_path: Path) -> None:
    queue = work_queue.Queue(tmp_path, GRID, tmp_path / "pause", 1)
    queue.waiting = [item for item in queue.waiting if item.part == grids.MAIN]
    assert not queue._start_next() and queue.waiting
