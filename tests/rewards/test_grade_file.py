"""`nemo-disco grade`: a verdict for each line of a file, or an error that names the first bad line."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from nemo_disco.commands.grade import grade_file
from nemo_disco.runtime.errors import UserError


def lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_one_verdict_a_line_in_order(tmp_path: Path) -> None:
    file = tmp_path / "responses.jsonl"
    records = [
        {"response": r"t</think>\boxed{1/2}", "answer": "0.5"},
        {"response": r"\boxed{7}", "answer": 7},
        {"response": r"t</think>\boxed{x+1}", "answer": ["2", "1+x"], "more": 1},
        {"response": r"t</think>\boxed{142}", "answer": 142.0},
    ]
    file.write_text(lines(*records))
    out = io.StringIO()
    grade_file(file, out, timeout=30.0, require_think=True)
    assert [json.loads(line) for line in out.getvalue().splitlines()] == [
        {"reward": 1.0, "reason": "correct"},
        {"reward": 0.0, "reason": "no </think>"},
        {"reward": 1.0, "reason": "correct"},
        {"reward": 1.0, "reason": "correct"},
    ]


def test_a_byte_order_mark_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "responses.jsonl"
    one = lines({"response": r"\boxed{1}", "answer": "1"})
    file.write_bytes(b"\xef\xbb\xbf" + (one + "\r\n  \n" + one + "\n").encode())
    out = io.StringIO()
    grade_file(file, out)
    assert [json.loads(line)["reward"] for line in out.getvalue().splitlines()] == [1.0, 1.0]


def test_the_answer_of_a_whole_solution_follows_its_hashes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Question files are read in the same way. An answer without `####` is taken as it stands."""
    file = tmp_path / "responses.jsonl"
    solution = "In all she sold 48+24 = <<48+1024=1072>>72 clips.\n#### 1,072"
    records = [{"response": rf"\boxed{{{n}}}", "answer": a} for n, a in ((1072, solution), (24, solution), (3, "3"))]
    file.write_text(lines(*records))
    out = io.StringIO()
    grade_file(file, out, timeout=30.0)
    assert [json.loads(line)["reward"] for line in out.getvalue().splitlines()] == [1.0, 0.0, 1.0]
    (warning,) = caplog.messages
    assert f"{file}: 2 answers" in warning and "####" in warning


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "line 2, column .: not valid JSON"),
        ("[" * 100_000, "line 2: not usable JSON"),
        ("[1]", "line 2: a list, not an object"),
        ('{"answer": "1"}', "line 2: the field `response` is missing"),
        ('{"response": "1"}', "line 2: the field `answer` is missing"),
        ('{"response": 1, "answer": "1"}', "line 2: `response` must be a string, not a number"),
        ('{"response": "1", "answer": null}', "line 2: `answer` is null"),
        ('{"response": "1", "answer": true}', "line 2: `answer` is True; an answer is text, a number"),
        ('{"response": "1", "answer": ["1", {}]}', "line 2: `answer` is {}; an answer is text, a number"),
        ('{"response": "1", "answer": []}', "line 2: `answer` is an empty list"),
        ('{"response": "1", "answer": " "}', "line 2: `answer` is empty"),
        ('{"response": "1", "answer": NaN}', "line 2: `answer` is empty"),
        ('{"response": "1", "answer": -Infinity}', "line 2: `answer` is -inf"),
        ('{"response": "1", "answer": "So.\\n####"}', "line 2: `answer` ends in `####`, and no answer follows it"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_graded(tmp_path: Path, bad: str, message: str) -> None:
    file = tmp_path / "responses.jsonl"
    file.write_text(lines({"response": r"\boxed{1}", "answer": "1"}) + bad + "\n")
    out = io.StringIO()
    with pytest.raises(UserError, match=message):
        grade_file(file, out)
    assert out.getvalue() == ""


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl: is missing"):
        grade_file(tmp_path / "none.jsonl", io.StringIO())
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        grade_file(tmp_path / "binary", io.StringIO())
