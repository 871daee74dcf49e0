"""The same command with other files: the quickstart's model trains on the papers' questions; all left out are reported.

Collected only where the files are present. Rewards are not tested, since this model cannot solve such problems.
"""

from __future__ import annotations

import re

import pytest
from commands import PAPER_DATA, read_metrics, run_directory

from nemo_disco.data.questions import load_questions

FILES = sorted([*(PAPER_DATA / "train").glob("*.json"), *(PAPER_DATA / "parquet").glob("*.parquet")])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_same_command_trains_on_each_file(file, commands, tmp_path):
    """Every record is loaded, or counted among those left out."""
    limit = ("data.max_prompt_length=400", "data.too_long=drop", "model.token_budget=512")
    result = commands("train", f"data.train_files=[{file}]", *limit, run_directory(tmp_path / "run")).ok()
    (line,) = read_metrics(tmp_path / "run")
    assert line["mini_batches/skipped"] == 0 and line["tokens"] > 16
    loaded = load_questions([file])
    for note in loaded.notes:
        assert note in result.err
    match = re.search(
        r"(\d+) of (\d+) questions left out, prompts over data.max_prompt_length=400 tokens: ", result.err
    )
    assert match is None or int(match[2]) == len(loaded.questions)
    assert len(result.err.splitlines()) == len(loaded.notes) + (match is not None)


def test_a_question_over_the_limit_is_named(commands, tmp_path):
    file = PAPER_DATA / "train/math.json"
    result = commands("train", f"data.train_files=[{file}]", run_directory(tmp_path / "run"))
    assert result.code == 2
    assert re.search(
        rf"error: {file}, record \d+: the prompt has \d+ tokens, data.max_prompt_length is \d+", result.err
    )


def test_two_kinds_of_files_in_one_run(commands, tmp_path):
    files = f"data.train_files=[{PAPER_DATA}/train/math.json,{PAPER_DATA}/parquet/aime.parquet]"
    limit = ("data.max_prompt_length=400", "data.too_long=drop", "model.token_budget=512", "trainer.max_steps=2")
    commands("train", files, *limit, run_directory(tmp_path / "run"), ranks=2).ok()
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2]
