"""Any content of a question file gives questions, which can be written again, or an error of one line."""

import datetime
import json
import os
import re
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_disco.data.question_fields import ANSWER_FIELDS, QUESTION_FIELDS
from nemo_disco.data.questions import load_questions
from nemo_disco.data.survey import write_questions
from nemo_disco.runtime.errors import UserError

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just("\udc80\n#### 1")
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "type", "text"]), inner, max_size=3)
        | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool"]), "content": inner})
    ),
    max_leaves=6,
)
RECORDS = st.dictionaries(st.sampled_from([*QUESTION_FIELDS, *ANSWER_FIELDS, "system", "\udc80"]), VALUES, max_size=4)


def check_loading(path):
    """Check that the file gives questions, which can be written and read back, or an error of one line."""
    loaded = result_or_none(lambda: load_questions([path], max_bad_records=1.0))
    if loaded is None:
        return
    assert loaded.questions and all(q.answers and q.messages for q in loaded.questions)
    for name in ("out.jsonl", "out.parquet"):
        out = path.with_name(name)
        if result_or_none(lambda out=out: write_questions(out, loaded.questions) or True) is None:
            assert name == "out.parquet"  # a column of Parquet has one type
            continue
        again = load_questions([out]).questions
        assert [(q.text, q.answers) for q in again] == [(q.text, q.answers) for q in loaded.questions]


def result_or_none(action):
    """Result of `action()`; None if it raises a UserError, whose message must be one line."""
    try:
        return action()
    except UserError as error:
        line = str(error)
    assert "\n" not in line
    return None


@settings(max_examples=150, deadline=None)
@given(records=st.lists(RECORDS | VALUES, max_size=3), suffix=st.sampled_from([".json", ".jsonl"]))
def test_any_record_is_loaded_or_refused_in_one_line(records, suffix):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"q{suffix}"
        path.write_text("\n".join(map(json.dumps, records)) if suffix == ".jsonl" else json.dumps(records))
        check_loading(path)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), suffix=st.sampled_from([".json", ".jsonl", ".parquet"]))
def test_any_damaged_file_is_loaded_or_refused_in_one_line(data, suffix):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"q{suffix}"
        records = [{"problem": "1+1?", "answer": "2"}, {"problem": "Größe?", "answer": "#### 3"}]
        if suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(records), path)
        else:
            path.write_text("\n".join(map(json.dumps, records)) if suffix == ".jsonl" else json.dumps(records))
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
        check_loading(path)


def write_parquet(tmp_path, **column):
    """Write a Parquet file of 11 questions with this column added or replaced. Returns its path."""
    table = pa.table({"problem": ["?"] * 11, "answer": ["1"] * 11} | column)
    pq.write_table(table, tmp_path / "q.parquet", store_schema=True)
    return tmp_path / "q.parquet"


def text_column(values):
    """Arrow column of text with these bytes, which need not be UTF-8."""
    return pa.array(values, pa.binary()).view(pa.string())


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("answer", text_column([b"1"] * 6 + [b"\xff\xfe"] + [b"1"] * 4)),
        ("day", pa.array([0] * 6 + [2**30] + [0] * 4, pa.int32()).view(pa.date32())),
        ("time", pa.array([0] * 6 + [2**60] + [0] * 4, pa.int64()).view(pa.timestamp("ms"))),
    ],
)
def test_an_unreadable_parquet_row_is_left_out_and_named(tmp_path, name, column):
    path = write_parquet(tmp_path, **{name: column})
    loaded = load_questions([path])
    assert len(loaded.questions) == 10
    (note,) = loaded.notes
    assert (
        f"1 of 11 records left out, malformed: record 7; the first: {path}, record 7: `{name}` cannot be read" in note
    )
    with pytest.raises(UserError, match="record 7: "):
        load_questions([path], max_bad_records=0.0)


def test_dates_and_surrogate_halves_are_written(write, tmp_path):
    lines = ['{"problem": "?", "answer": "1", "note": "\\udc80 \\u00e9"}', '{"problem": "!", "answer": "2"}']
    questions = load_questions([write("q.jsonl", "\n".join(lines))]).questions
    dated = load_questions([write_parquet(tmp_path, day=pa.array([datetime.date(2026, 1, 2)] * 11))]).questions
    for name in ("a.jsonl", "a.json", "a.parquet"):
        for expected in (questions, dated):
            write_questions(tmp_path / name, expected)
            again = load_questions([tmp_path / name]).questions
            assert [q.text for q in again] == [q.text for q in expected]
    write_questions(tmp_path / "a.jsonl", questions)
    assert load_questions([tmp_path / "a.jsonl"]).questions[0].metadata == {"note": "\udc80 é"}


@pytest.mark.parametrize("name", ["q.json", "q.jsonl", "q.parquet"])
def test_a_named_pipe_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / name))):
        load_questions([tmp_path / name])


@pytest.mark.parametrize("name", ["dataset_dict.json", "state.json", "data.arrow"])
def test_a_named_pipe_in_a_saved_dataset_is_refused_at_once(tmp_path, name):
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / name}: a FIFO")):
        load_questions([tmp_path])
