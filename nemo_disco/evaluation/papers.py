"""Tables that compare evaluations with the papers' reported scores, and with a reference run by AES.

The reported rows are averages over the six sets of arXiv 2505.12366 (8k tokens in training and evaluation).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nemo_disco.evaluation.result import EvaluationResult, read_evaluations
from nemo_disco.evaluation.statistics import accuracy_efficiency_score, avg_at_k, bootstrap, pass_at_k
from nemo_disco.runtime.errors import UserError

SETS = {
    "aime": "AIME 2024",
    "aime25": "AIME 2025",
    "math": "MATH 500",
    "amc": "AMC 2023",
    "minerva": "Minerva",
    "olympiad_bench": "O-Bench",
}
_METHODS = ("base model", "GRPO", "GRPO-ER", "Dr. GRPO", "DAPO", "TRPA", "DisCO (L-ratio)", "DisCO (log-L)")
# Trained model -> the average score of each of _METHODS.
REPORTED: dict[str, tuple[float, ...]] = {
    "DeepSeek-R1-Distill-Qwen-1.5B": (0.376, 0.457, 0.460, 0.443, 0.473, 0.470, 0.524, 0.533),
    "DeepSeek-R1-Distill-Qwen-7B": (0.513, 0.592, 0.593, 0.575, 0.570, 0.578, 0.627, 0.625),
    "DeepSeek-R1-Distill-Llama-8B": (0.462, 0.516, 0.529, 0.526, 0.527, 0.527, 0.579, 0.584),
}


def papers_table(results: Sequence[EvaluationResult], model: str | None) -> str:
    """Table of Pass@1 of each set, those of SETS first and in its order, and the average over SETS if all are there;
    then the reported rows, if `model` is a key of REPORTED."""
    by_name = {result.name: result for result in results}
    names = [name for name in SETS if name in by_name] + [name for name in by_name if name not in SETS]
    titles = [SETS.get(name, name) for name in names]
    scores = [float(avg_at_k(by_name[name].correct).mean()) for name in names]
    complete = by_name.keys() >= SETS.keys()
    average = f"{np.mean([s for n, s in zip(names, scores, strict=True) if n in SETS]):.3f}" if complete else "-"
    rows = [["Pass@1", *titles, "Avg. of six"], ["this model", *(f"{s:.3f}" for s in scores), average]]
    if model in REPORTED:
        reported = REPORTED[model]
        rows.append([f"reported for {model} (arXiv 2505.12366):", *[""] * len(names), ""])
        rows += [[f"  {m}", *["-"] * len(names), f"{v:.3f}"] for m, v in zip(_METHODS, reported, strict=True)]
    first = max(len(row[0]) for row in rows if row[-1])
    widths = [first, *(max(len(row[i]) for row in rows) for i in range(1, len(rows[0])))]
    lines = [
        "  ".join([row[0].ljust(first), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def print_tables(
    results: Sequence[EvaluationResult], reference: Mapping[str, EvaluationResult], model: str | None
) -> None:
    """Print the papers' table if one of the papers' sets was evaluated, and the AES table if there is a reference."""
    if any(result.name in SETS for result in results):
        print(papers_table(results, model))
    if reference:
        print(efficiency_table(results, reference))


def print_estimates(result: EvaluationResult) -> None:
    """Print every statistic of one set with its 95% interval, and pass@k for powers of two between 1 and K."""
    print(f"{result.name}: {result.questions} questions x {result.samples} samples")
    powers = [2**i for i in range(1, result.samples.bit_length()) if 2**i < result.samples]
    pass_k = {f"pass@{k}": bootstrap(pass_at_k(result.correct, k)) for k in powers}
    for name, e in {**result.estimates(), **pass_k}.items():
        if e is not None:
            print(f"  {name:<10} {e.value:.4f}  95% [{e.low:.4f}, {e.high:.4f}]")


def read_reference(directory: Path) -> dict[str, EvaluationResult]:
    """Set -> its latest evaluation, from a run directory or one of evaluations. Raises UserError if there is none."""
    places = [directory / "evaluation", directory / "evaluate", directory]
    results = next((results for place in places if (results := read_evaluations(place))), None)
    if results is None:
        raise UserError(f"evaluation.reference={directory}: no evaluation there; give a directory with SET.step_N.json")
    return {result.name: result for result in results}  # sorted by step, so the last of each set stays


def efficiency_table(results: Sequence[EvaluationResult], reference: Mapping[str, EvaluationResult]) -> str:
    """Table of length, accuracy and AES of each set that the reference has too, and the mean AES."""
    lines, scores = [f"{'AES':<16}{'length':>10}{'ref.':>10}{'Pass@1':>9}{'ref.':>9}{'AES':>9}"], []
    for result in results:
        if (other := reference.get(result.name)) is None:
            continue
        means = float(result.lengths.mean()), float(avg_at_k(result.correct).mean())
        baseline = float(other.lengths.mean()), float(avg_at_k(other.correct).mean())
        if min(baseline) <= 0:
            lines.append(f"{SETS.get(result.name, result.name):<16}  no score: the reference has no correct answer")
            continue
        scores.append(accuracy_efficiency_score(*means, baseline))
        lines.append(
            f"{SETS.get(result.name, result.name):<16}{means[0]:>10,.1f}{baseline[0]:>10,.1f}"
            f"{means[1]:>9.3f}{baseline[1]:>9.3f}{scores[-1]:>9.3f}"
        )
    if scores:
        lines.append(f"{'mean':<54}{np.mean(scores):>9.3f}")
    return "\n".join(lines)
