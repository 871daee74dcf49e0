"""A working directory with the files that the documents' commands name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from blocks import REPO

from nemo_disco.evaluation.result import EvaluationResult, write_evaluation

QUESTIONS = [{"problem": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(4)]
REWARD = "def brief(response, answers):\n    return 1.0\n"


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a test, with question files, the quickstart's assets and a user's reward."""
    for name in ("questions.jsonl", "heldout.jsonl", "more.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS[name == "heldout.jsonl" :]))
    (tmp_path / "answers.jsonl").write_text(json.dumps({"response": r"\boxed{4}", "answer": "4"}) + "\n")
    (tmp_path / "assets").symlink_to(REPO / "assets")
    (tmp_path / "my_rewards.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def runs(directory: Path) -> None:
    """Run directories as two finished runs, quickstart and grpo, leave them."""
    for name in ("quickstart", "grpo"):
        run = directory / "runs" / name
        (run / "rollouts").mkdir(parents=True)
        (run / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n')
        line = {"question": QUESTIONS[1]["problem"], "response": "2", "reward": 1.0, "correct": True}
        (run / "rollouts/step_1.jsonl").write_text(json.dumps(line) + "\n")
        correct = np.array([[True, False]])
        write_evaluation(run / "evaluation", EvaluationResult("s", 0, correct, correct * 5, correct * False))
