"""The fact-chain arm: its gradient is that of the whole loss; its loop runs, resumes and refuses damaged records."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from benchmarks.study.fact_chain import __main__ as command_line
from benchmarks.study.fact_chain import policy, report, runs, task, training
from benchmarks.study.results_file import DamagedRecordError, read_records
from nemo_disco.algorithms import build_objective

EACH = 4  # responses to a question
DELTA, BETA = 1e-3, 40.0


# --- the gradient ---


def make_batch() -> tuple[policy.FactPolicy, Tensor, training.Tokens, Tensor]:
    """A float64 policy that has moved from the one of the table, and the tokens and verdicts of 3 questions."""
    start = policy.warm_start(3, 0.2, 0.8, 40).double()
    table, moved = start.table(), copy.deepcopy(start)
    with torch.no_grad():
        for weight in moved.parameters():
            weight += 0.05 * torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(1))
    questions = task.draw_sets((3,))[0]
    samples = policy.sample(table, questions, EACH, torch.Generator().manual_seed(2))
    right = torch.tensor([1, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0]).bool()  # the last question has wrong ones alone
    return moved, table, training.pack(samples, questions, EACH), right


def dense_loss(
    name: str, likely: int, moved: policy.FactPolicy, table: Tensor, tokens: training.Tokens, right: Tensor
) -> Tensor:
    """-J + beta max(KL - delta, 0)^2, written out response by response, with a graph to the policy's weights."""
    old, new = table[tokens.symbols, tokens.terms], moved(tokens.symbols, tokens.terms)
    divergences = []
    for p, q in zip(old.exp(), new.exp(), strict=True):
        first = p.argsort(descending=True)[:likely]
        rest = torch.ones_like(p, dtype=torch.bool)
        rest[first] = False
        terms = [(p[first] * (p[first] / q[first]).log()).sum()]
        if rest.any():
            terms.append(p[rest].sum() * (p[rest].sum() / q[rest].sum()).log())
        divergences.append(torch.stack(terms).sum())
    ratios = (new - old).gather(1, tokens.next[:, None])[:, 0].exp()
    responses = ratios.split(tokens.lengths.tolist())
    values = []
    for first_response in range(0, len(right), EACH):
        group = slice(first_response, first_response + EACH)
        verdicts, ratio_lists = right[group], responses[group]
        if name == "grpo":
            rewards = verdicts.double()
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
            for advantage, ratio in zip(advantages, ratio_lists, strict=True):
                clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                values.append(clipped.mean() / len(right))
        elif verdicts.any() and not verdicts.all():
            scores = torch.stack([ratio.mean() for ratio in ratio_lists])
            robust = scores[~verdicts].exp().mean().log()  # tau 1
            values.append((scores[verdicts].mean() - robust) / (len(right) // EACH))
    excess = torch.stack(divergences).mean() - DELTA
    return BETA * excess.clamp(min=0) ** 2 - torch.stack(values).sum()


@pytest.mark.parametrize("likely", [task.SYMBOLS, 4])
@pytest.mark.parametrize("name", ["grpo", "disco"])
def test_the_gradient_is_that_of_the_whole_loss(name: str, likely: int) -> None:
    moved, table, tokens, right = make_batch()
    constraint = {"kind": "squared_hinge", "estimator": "top_k", "top_k": likely, "delta": DELTA, "beta": BETA}
    score = {"score": "likelihood_ratio"} if name == "disco" else {}
    objective = build_objective({"name": name, **score, "constraint": constraint})
    metrics = training.accumulate_gradient(moved, objective, table, tokens, right, EACH)
    assert metrics["constraint/active"] == 1 and metrics["constraint/penalty"] > 1e-3
    gradients = torch.autograd.grad(dense_loss(name, likely, moved, table, tokens, right), [*moved.parameters()])
    for weight, expected in zip(moved.parameters(), gradients, strict=True):
        torch.testing.assert_close(weight.grad, expected, rtol=1e-10, atol=1e-10)


# --- the task and the policy ---


def test_no_question_is_in_two_sets() -> None:
    sets = task.draw_sets((30, 30, 60))
    rows = [tuple(row) for part in sets for row in torch.cat([part.first[:, None], part.terms], 1).tolist()]
    assert [len(part) for part in sets] == [30, 30, 60] and len(set(rows)) == 120


def test_responses_are_sampled_from_the_policy_and_graded_by_the_sum() -> None:
    table = task.draw_facts(0, 1.0, 1.0).clamp(min=1e-30).log()  # every fact is known
    questions = task.draw_sets((20,))[0]
    assert policy.sample(table, questions, 2, torch.Generator().manual_seed(0)).right.all()
    uniform = torch.full_like(table, 1 / task.SYMBOLS).log()
    samples = policy.sample(uniform, questions, 400, torch.Generator().manual_seed(0))
    assert samples.right.double().mean().item() == pytest.approx(1 / task.SYMBOLS, abs=0.01)


# --- the arm ---


@pytest.fixture
def grid_file(tmp_path: Path) -> Path:
    """The arm's grid with trainings of three steps, one tuning start and two starts."""
    grid = runs.load_grid()
    grid["start"]["steps"] = 5
    grid["questions"] = {"test": 8, "development": 8, "train": 12}
    grid["evaluation_samples"] = 4
    grid["training"] |= {"steps": 3, "questions": 4, "mini_batch_questions": 2, "responses": 4, "points": 3}
    grid["tuning"]["starts"], grid["main"]["starts"] = [101], [1, 2]
    grid["tuning"]["candidates"] = {
        "unconstrained": {"learning_rates": [1e-3]},
        "constrained": {"learning_rates": [1e-3], "betas": [1e3]},
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(grid))
    return path


def execute_some(grid: dict[str, Any], records: list[dict[str, Any]], count: int) -> None:
    """Execute `count` further runs, as if the process were killed then."""
    for _, _ in zip(range(count), runs.run_all(grid, records), strict=False):
        pass


def test_the_arm_runs_resumes_and_reports(grid_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "runs.jsonl"
    arguments = ["--grid", str(grid_file), "--results", str(results)]
    command_line.main(["run", *arguments])
    lines = results.read_text().splitlines(keepends=True)
    grid = runs.load_grid(grid_file)
    assert [json.loads(line)["name"] for line in lines] == [run.name for run in runs.list_runs(grid)]
    results.write_text("".join(lines[:-2]))
    capsys.readouterr()
    command_line.main(["run", *arguments])
    assert len(capsys.readouterr().out.splitlines()) == 2, "finished runs were run again"
    unchanged = [
        {k: v for k, v in json.loads(line).items() if k not in ("processor_seconds", "version")}
        for text in (lines, results.read_text().splitlines())
        for line in text[-2:]
    ]
    assert unchanged[:2] == unchanged[2:]
    command_line.main(["report", *arguments])
    page = (tmp_path / "report.md").read_text()
    assert "Nothing was cut" in page and "What this does not say" in page
    assert all(label in page for family in report.list_families(grid) for label, _, _ in family.pairs)


def test_every_cell_trains_from_the_same_start_with_as_many_tuning_runs(grid_file: Path) -> None:
    for grid in (runs.load_grid(), runs.load_grid(grid_file)):
        cells = runs.list_cells(grid)
        assert len({len(runs.list_cell_candidates(grid, cell)) for cell in cells}) == 1
        assert not set(grid["tuning"]["starts"]) & set(grid["main"]["starts"])
    records: list[dict[str, Any]] = []
    execute_some(grid, records, 3)
    assert len({r["start_weights"] for r in records}) == 1
    runs.check_records(grid, records)


def test_damaged_and_foreign_records_are_refused(grid_file: Path, tmp_path: Path) -> None:
    grid, results = runs.load_grid(grid_file), tmp_path / "runs.jsonl"
    records: list[dict[str, Any]] = []
    execute_some(grid, records, 2)
    whole = "".join(json.dumps(r) + "\n" for r in records)
    for damage in (whole[:-5], whole[:-1], whole + whole, whole + "[]\n"):
        results.write_text(damage)
        with pytest.raises(DamagedRecordError, match="line"):
            command_line.main(["run", "--grid", str(grid_file), "--results", str(results)])
    results.write_text(whole)
    assert read_records(results) == records
    with pytest.raises(runs.OtherSettingsError, match="other settings"):
        runs.check_records(grid | {"evaluation_samples": 5}, records)
    with pytest.raises(runs.OtherSettingsError, match="other weights"):
        runs.check_records(grid, [records[0], records[1] | {"start_weights": "0"}])


def test_a_policy_that_diverges_has_no_right_response(grid_file: Path) -> None:
    grid = runs.load_grid(grid_file)
    run = runs.list_runs(grid)[0]
    record = runs.execute_run(run, runs.Candidate(1e30), grid)
    assert record["diverged"] is not None and record["correct"] == [0] * 8
