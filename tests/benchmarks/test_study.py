"""The study's queue finishes, resumes and pauses, and its report shows the results of its runs.

How well the methods learn is not tested.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from study_records import make_all_records, make_record

from benchmarks.study import __main__ as command_line
from benchmarks.study import (
    claims,
    comparisons,
    hypotheses_report,
    prepare,
    report,
    statistics,
    tables,
    task,
    work_queue,
)
from benchmarks.study import grid as grids
from benchmarks.study.candidates import Candidate
from benchmarks.study.objectives import PerMicroBatch
from benchmarks.study.runs import FinishedRuns
from nemo_disco.algorithms import MiniBatch, build_objective
from nemo_disco.commands.checks import check_objective
from nemo_disco.config.compose import compose
from nemo_disco.config.consistency import check_consistency
from nemo_disco.evaluation.statistics import accuracy_efficiency_score

REPO = Path(__file__).parents[2]
GRID = grids.load_grid()
ARMS = {name: grids.load_grid(grids.HERE / f"{name}.yaml") for name in ("grid", "hard_start", "length")}


@pytest.mark.slow
@pytest.mark.parametrize("grid", ARMS.values(), ids=ARMS)
def test_every_run_of_a_grid_is_one_that_the_product_takes(grid: grids.Grid, tmp_path: Path) -> None:
    runs = grids.list_runs(grid)
    assert len({run.name for run in runs}) == len(runs)
    assert runs[0].part == grids.BASE
    main_seeds = [run.seed for run in runs if run.part == grids.MAIN]
    assert main_seeds == sorted(main_seeds)
    for run in {run.overrides: run for run in runs}.values():
        candidate = run.candidate or Candidate(1e-3)
        _, name, _, config_path, *overrides = run.arguments(tmp_path, tmp_path / "model", candidate)
        config = compose(name, [*overrides, f"exp_manager.explicit_log_dir={tmp_path}"], config_path)
        check_consistency(config, 1)
        check_objective(config)
        assert Path(config.evaluation.files[0]).stem == ("development" if run.part == grids.TUNING else "test")


def test_the_chosen_candidate_is_the_best_of_all_or_none_yet() -> None:
    tuning = [run for run in grids.list_runs(GRID) if run.part == grids.TUNING and run.method == "grpo"]
    accuracies = (0.2, 0.8, 0.5)
    records = [make_record(run, accuracy) for run, accuracy in zip(tuning, accuracies, strict=True)]
    candidates = [run.candidate for run in tuning]
    assert grids.choose_candidate("grpo", records[:2], candidates) is None
    assert grids.choose_candidate("grpo", records, candidates) == tuning[1].candidate
    assert grids.choose_candidate("grpo", records, candidates[2:]) == tuning[2].candidate, "of those in the grid alone"
    records[1]["failed"] = "diverged"
    assert grids.choose_candidate("grpo", records, candidates) == tuning[2].candidate


def test_each_method_of_a_grid_with_hypotheses_has_as_many_tuning_runs() -> None:
    grid = ARMS["hard_start"]
    assert len({len(grids.list_method_candidates(grid, method)) for method in grid["methods"]}) == 1


@pytest.mark.parametrize("grid", ARMS.values(), ids=ARMS)
def test_no_held_out_question_is_trained_on(grid: grids.Grid) -> None:
    setup = prepare.Setup.from_grid(grid)
    test, development, train = prepare.split_problems(setup)
    held_out = {p.numbers for p in (*test, *development)}
    assert len(held_out) == 2 * prepare.HELD_OUT and len(train) == setup.train
    supervised = islice(prepare.draw_supervised(setup, 3), 800)
    assert not held_out & {p.numbers for p in (*train, *supervised)}


@pytest.mark.parametrize("settings", [prepare.Setup.from_grid(grid).task for grid in ARMS.values()], ids=ARMS)
def test_a_worked_solution_is_right_however_it_is_worked(settings: task.TaskSettings) -> None:
    styles = {task.Problem((7, 2, 9, 4), "", style, settings).solution for style in range(50)}
    assert len(styles) > 4
    for solution in styles:
        *steps, think, box = solution.splitlines()
        assert think == "</think>" and box == "\\boxed{22}"
        assert all(eval(step.replace("=", "==")) for step in steps)


def make_mini_batch(seed: int, questions: int) -> MiniBatch:
    """A random mini-batch of 4 responses to each question, 2 of them right, whose log-probs are below the old ones."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (questions * 4,), generator=rng)
    old = -torch.rand(int(lengths.sum()), generator=rng).double()
    new = old - 0.3 * torch.rand(len(old), generator=rng).double()
    rewards = (torch.arange(questions * 4) % 4 < 2).double()
    ids = torch.arange(questions).repeat_interleave(4)
    return MiniBatch(new, old, lengths, ids, rewards, max_response_length=9)


def test_per_micro_batch_is_disco_where_there_is_one_and_the_mean_of_their_penalties_where_there_are_more() -> None:
    exact = build_objective({"name": "disco", "constraint": {"estimator": "k1", "delta": 0.01, "beta": 7.0}})
    batch = make_mini_batch(0, questions=4)
    whole, halves = (PerMicroBatch(beta=7.0, delta=0.01, questions=n)(batch) for n in (4, 2))
    torch.testing.assert_close(whole.loss, exact(batch).loss)
    torch.testing.assert_close(whole.token_weights, exact(batch).token_weights)
    middle = int(batch.lengths[:8].sum())
    log_ratios = batch.old_log_probs - batch.log_probs
    penalties = [7.0 * max(float(half.mean()) - 0.01, 0) ** 2 for half in (log_ratios[:middle], log_ratios[middle:])]
    free = build_objective({"name": "disco", "constraint": {"kind": "none"}})(batch).loss
    assert float(halves.loss - free) == pytest.approx(sum(penalties) / 2, rel=1e-9)


def test_a_difference_is_by_question_and_over_common_seeds() -> None:
    a = {1: np.array([1.0, 0.5]), 2: np.array([0.5, 0.5]), 3: np.array([0.0, 0.0])}
    b = {1: np.array([0.5, 0.0]), 2: np.array([0.0, 0.0])}
    difference = statistics.estimate_difference(a, b)
    assert difference is not None and (difference.value, difference.low, difference.high) == (0.5, 0.5, 0.5)
    assert statistics.estimate_difference({1: a[1]}, {2: b[2]}) is None
    assert accuracy_efficiency_score(60, 0.8, (100, 0.8)) == pytest.approx(0.4)
    assert accuracy_efficiency_score(50, 0.72, (100, 0.8)) == pytest.approx(0.5 - 1.0)


def test_the_report_says_what_the_runs_say(tmp_path: Path) -> None:
    accuracies = {"disco_logl": 0.9, "grpo": 0.3, "grpo_rw": 0.3, "disco_b_lratio.clip_0.2": 0.95}
    records = make_all_records(GRID, accuracies)
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    page = report.write_report(tmp_path).read_text()
    assert "Nothing was cut" in page
    ablation_seeds = len(GRID["ablations"]["seeds"])
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in page.splitlines() if line.startswith("| ")}
    assert rows["DisCO log-L above GRPO"].endswith("| 5 | holds |")
    assert rows["not clipping is better than 0.2, 0.2"].endswith(f"| {ablation_seeds} | the opposite |")
    assert rows["dividing GRPO's question weight out (GRPO_RW) is better"].endswith("| 5 | not decided |")
    figures = {path.name for path in tmp_path.glob("*.png")}
    assert figures == {"curves.png", "kl.png", "wins.png", "ablations.png", "lengths.png"}
    assert all(f"({name})" in page for name in figures)


def test_a_study_that_was_cut_says_so_and_decides_nothing_by_one_seed() -> None:
    records = [
        r
        for r in make_all_records(GRID, {"disco_logl": 0.9, "grpo": 0.2})
        if r["part"] != grids.LENGTH and r["seed"] in (1, GRID["tuning"]["seed"])
    ]
    cut = FinishedRuns(records, GRID)
    assert f"length: 0 of {cut.count_planned(grids.LENGTH)} runs" in report._describe_missing_runs(cut)
    assert "| 1 | one seed: not decided |" in claims.tabulate_claims(cut)
    main_only = FinishedRuns([r for r in records if r["part"] == grids.MAIN], GRID)
    assert "| not run |" in claims.tabulate_claims(main_only)
    assert "holds" not in claims.tabulate_claims(cut)
    assert tables.collect_length_points(cut).keys() <= {"GRPO", "DisCO log-L"}


TINY = """
setup: {recipe: {batch: 4, check_from: 1, check_every: 1, stop_at: 0.0, max_steps: 1}}
run: [trainer.max_steps=2, data.questions_per_step=4, algorithm.mini_batch_questions=2, evaluation.samples=2]
methods:
  grpo: {label: GRPO, overrides: [algorithm=grpo]}
tuning: {learning_rates: [1e-3], seed: 7}
main: {seeds: [1]}
"""


# Runs keep normal priority here, since at the lowest one they would not end beside other tests.
START = """
from benchmarks.study import __main__, processes
processes.lower_priority = lambda pid: None
__main__.main()
"""


def start_study(work: Path, grid: Path) -> subprocess.Popen[bytes]:
    """Start `python -m benchmarks.study run` with the grid, one run at a time."""
    command = [sys.executable, "-c", START, "run", str(work), "--grid", str(grid), "--jobs=1"]
    return subprocess.Popen(command, cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_two_items_through_pause_end_resume_and_report(tmp_path: Path) -> None:
    work, grid = tmp_path / "work", tmp_path / "grid.yaml"
    grid.write_text(TINY)
    work.mkdir()
    (work / "pause").touch()
    study = start_study(work, grid)
    time.sleep(15)
    assert study.poll() is None and not [*(work / "logs").glob("*")], "a run started while the study was paused"
    (work / "pause").unlink()
    results = work / "runs.jsonl"
    while not results.exists() or len(results.read_text().splitlines()) < 2:
        assert study.poll() is None, [p.read_text() for p in (work / "logs").glob("*")]
        time.sleep(0.2)
    study.send_signal(signal.SIGTERM)
    assert study.wait(60) == 1
    assert load_file(work / "start_0" / "model.safetensors")
    before = results.read_text().splitlines()[:2]
    results.write_text("".join(f"{line}\n" for line in before))
    assert start_study(work, grid).wait(300) == 0
    *first, last = results.read_text().splitlines()
    assert first == before, "a finished run was run again"
    record = json.loads(last)
    assert grids.name_record(record) == "main.grpo.seed_1"
    assert record["learning_rate"] == 1e-3 and len(record["curve"]["reward"]) == 2
    assert len(record["evaluation"]["correct"]) == prepare.HELD_OUT and not [*(work / "runs").iterdir()]
    command_line.write_report(GRID, tmp_path / "out", work)
    page = (tmp_path / "out" / "report.md").read_text()
    assert "3 runs" in page and (tmp_path / "out" / "curves.png").exists()


def test_a_run_whose_candidate_is_not_known_waits(tmp_path: Path) -> None:
    queue = work_queue.RunQueue(tmp_path, GRID, tmp_path / "runs.jsonl", tmp_path / "pause", 1)
    queue.waiting = [run for run in queue.waiting if run.part == grids.MAIN]
    assert not queue._start_next() and queue.waiting


def test_the_queue_goes_on_after_the_records_of_a_results_file(tmp_path: Path) -> None:
    records = make_all_records(GRID, {})
    results = tmp_path / "runs.jsonl"
    results.write_text("".join(json.dumps(r) + "\n" for r in records[:40]))
    queue = work_queue.RunQueue(tmp_path, GRID, results, tmp_path / "pause", 1)
    assert [run.name for run in queue.waiting] == [grids.name_record(r) for r in records[40:]]


def test_a_start_with_other_weights_than_the_finished_runs_of_its_seed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "start_0").mkdir()
    (tmp_path / "start_0" / "model.safetensors").write_bytes(b"weights")
    run = grids.list_runs(GRID)[1]
    with pytest.raises(RuntimeError, match="other weights"):
        work_queue.execute_run(run, GRID, Candidate(1e-3), tmp_path, tmp_path / "runs.jsonl", {"0123456789ab"})


def test_the_report_of_the_hypotheses_decides_by_start_and_shows_every_method(tmp_path: Path) -> None:
    grid = ARMS["hard_start"]
    records = make_all_records(grid, {"grpo_k3": 0.8, "grpo": 0.3, "disco_logl_k3": 0.79})
    failed = next(r for r in records if r["method"] == "grpo" and r["seed"] == 3)
    del failed["evaluation"]
    failed["failed"] = "training ended with code 2"
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    page = hypotheses_report.write_report(grid, tmp_path).read_text()
    assert "Nothing was cut" in page and "which counts as accuracy 0: main.grpo.seed_3" in page
    assert "(3)" in page, "each start is named by its seed"
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in page.splitlines() if line.startswith("| ")}
    assert rows["GRPO constrained - GRPO"].endswith("| holds |")
    assert rows["DisCO log-L constrained - GRPO constrained"].endswith("| not decided |")
    assert all(label in page for label in (m["label"] for m in grid["methods"].values()))
    cut = records[:-1]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in cut))
    page = hypotheses_report.write_report(grid, tmp_path).read_text()
    assert "main: 7 of 8 starts are complete, and left out is the start of seed 8 (5 of 6 runs)." in page
    [row] = [line for line in page.splitlines() if line.startswith("| GRPO constrained - GRPO |")]
    assert " | 7 | " in row, "a start that lacks a method is not compared"


@pytest.mark.parametrize("starts", [0, 1, 2])
def test_a_report_of_few_starts_says_how_little_they_decide(starts: int, tmp_path: Path) -> None:
    grid = ARMS["hard_start"]
    accuracies = {"grpo_k3": 0.8, "grpo": 0.3}
    records = [r for r in make_all_records(grid, accuracies) if r["seed"] in (101, *range(1, starts + 1))]
    for record in records:
        if record["method"] == "disco_lratio":
            record["failed"] = "the policy diverged"
            del record["evaluation"]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    page = hypotheses_report.write_report(grid, tmp_path).read_text()
    assert f"main: {starts} of 8 starts are complete." in page
    [row] = [line for line in page.splitlines() if line.startswith("| GRPO constrained - GRPO |")]
    assert row.endswith(("| not run |", "| one start: not decided |", "| holds |")[starts])
    assert ("**With 2 starts the intervals are too narrow, and p is 0.5 at least.**" in page) == (starts == 2)
    assert "main.disco_lratio.seed_1" in page or not starts


def test_the_report_of_lengths_compares_each_method_with_the_one_without_a_penalty(tmp_path: Path) -> None:
    grid = ARMS["length"]
    records = make_all_records(grid, {})
    for record in records:
        if record["method"].endswith("drpo_0.1"):
            record["evaluation"]["length"] = [20.0] * len(record["evaluation"]["length"])
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    page = hypotheses_report.write_report(grid, tmp_path).read_text()
    *_, row = [line for line in page.splitlines() if line.startswith("| DRPO 0.1 |")]
    assert "-10.000 [-10.000, -10.000]" in row and row.endswith("| DisCO log-L |")
    assert sum(line.startswith("| DRPO 0.1 |") for line in page.splitlines()) == 2, "its entropy and KL are shown too"


def test_an_interval_decides_on_a_hypothesis_and_the_sign_flip_test_is_exact() -> None:
    assert comparisons.sign_flip_test([1.0] * 8) == 2 / 2**8
    assert comparisons.sign_flip_test([1.0, -1.0]) == 1.0
    assert comparisons.sign_flip_test([]) is None
    high, low = ({s: np.full(4, level + 0.01 * s) for s in range(8)} for level in (0.5, 0.2))
    mixed = {s: np.full(4, 0.5 + (-1) ** s * 0.1) for s in range(8)}
    pairs = ((high, low), (low, high), (mixed, high), (high, {}), ({1: high[1]}, low))
    decisions = [comparisons.compare("", first, second).decision for first, second in pairs]
    assert decisions == ["holds", "the opposite", "not decided", "not run", "one start: not decided"]
