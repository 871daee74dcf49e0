"""The same command with other files: the papers' problems train the quickstart's model, nothing dropped unsaid.

Collected where the files are at hand. Rewards are what they are: this model knows no such problem.
"""

from __future__ import annotations

import re

import pytest
from commands import PAPER_DATA, at, metrics

from nemo_disco.data.questions import load_questions

FILES = sorted([*(PAPER_DATA / "train").glob("*.json"), *(PAPER_DATA / "parquet").glob("*.parquet")])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_same_command_trains_on_it(file, commands, tmp_path):
    """Every record is asked, or counted among those left out."""
    limit = ("data.max_prompt_length=400", "data.too_long=drop", "model.token_budget=512")
    done = commands("train", f"data.train_files=[{file}]", *limit, at(tmp_path / "run")).ok()
    (line,) = metrics(tmp_path / "run")
    assert line["mini_batches/skipped"] == 0 and line["tokens"] > 16
    loaded = load_questions([file])
    for note in loaded.notes:
        assert note in done.err
    dropped = re.search(
        r"(\d+) of (\d+) questions left out, prompts over data.max_prompt_length=400 tokens: ", done.err
    )
    assert dropped is None or int(dropped[2]) == len(loaded.questions)
    assert len(done.err.splitlines()) == len(loaded.notes) + (dropped is not None)


def test_a_question_over_the_limit_is_named(commands, tmp_path):
    file = PAPER_DATA / "train/math.json"
    done = commands("train", f"data.train_files=[{file}]", at(tmp_path / "run"))
    assert done.code == 2
    assert re.search(rf"error: {file}, record \d+: the prompt has \d+ tokens, data.max_prompt_length is \d+", done.err)


def test_two_kinds_of_files_in_one_run(commands, tmp_path):
    files = f"data.train_files=[{PAPER_DATA}/train/math.json,{PAPER_DATA}/parquet/aime.parquet]"
    limit = ("data.max_prompt_length=400", "data.too_long=drop", "model.token_budget=512", "trainer.max_steps=2")
    commands("train", files, *limit, at(tmp_path / "run"), ranks=2).ok()
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
