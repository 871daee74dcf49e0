"""All file formats give the same records; a missing, empty or malformed file is named with the place."""

import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_disco.data.record_files import read_records
from nemo_disco.runtime.errors import UserError

RECORDS = [{"problem": "a\u2028b", "answer": ["1", "2"]}, {"problem": "c", "answer": ["3"]}]


def save_dataset(path, table, shards=2):
    """Write a table as `datasets.Dataset.save_to_disk` does."""
    path.mkdir()
    names = [f"data-{i:05}-of-{shards:05}.arrow" for i in range(shards)]
    rows = -(-table.num_rows // shards)
    for i, name in enumerate(names):
        with pa.OSFile(str(path / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table.slice(i * rows, rows))
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (path / "dataset_info.json").write_text("{}")
    return path


@pytest.fixture(params=["json", "jsonl", "blank_lines", "bom", "parquet", "dataset"])
def records_file(request, write, tmp_path):
    """Path of a file, or saved dataset, that holds RECORDS in one of the formats."""
    table = pa.Table.from_pylist(RECORDS)
    if request.param == "json":
        return write("q.json", RECORDS)
    if request.param == "jsonl":
        return write("q.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in RECORDS))
    if request.param == "blank_lines":
        return write("q.jsonl", "\r\n\r\n".join(json.dumps(r) for r in RECORDS))
    if request.param == "bom":
        return write("q.JSON", b"\xef\xbb\xbf" + json.dumps(RECORDS).encode())
    if request.param == "dataset":
        return save_dataset(tmp_path / "saved", table)
    pq.write_table(table, tmp_path / "q.parquet")
    return tmp_path / "q.parquet"


def test_all_file_formats_give_the_same_records(records_file):
    assert [r.fields for r in read_records(records_file)] == RECORDS


def test_places_count_from_one_and_lines_include_blank_ones(write):
    assert [r.place for r in read_records(write("q.jsonl", '{"a": 1}\n\n{"a": 2}\n'))] == ["line 1", "line 3"]
    assert [r.place for r in read_records(write("q.json", '[{"a": 1}, {"a": 2}]'))] == ["record 1", "record 2"]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("q.json", "", ": the file holds no records"),
        ("q.json", "[]", ": the file holds no records"),
        ("q.jsonl", "\n\n", ": the file holds no records"),
        ("q.json", '[{"a": 1},\n {"a": }]', ", line 2, column 8: not valid JSON: Expecting value"),
        ("q.jsonl", '{"a": 1}\n{"a": 2', ", line 2, column 8: not valid JSON"),
        ("q.json", '{"a": 1}\n{"a": 2}', "if it holds one record a line, name it .jsonl"),
        ("q.json", '{"data": []}', ": the top level is an object, not a list of records"),
        ("q.json", "3", ": the top level is a number"),
        ("q.json", '[{"a": 1}, "b"]', ", record 2: a string, not an object with fields"),
        ("q.jsonl", '{"a": 1}\nnull', ", line 2: null, not an object with fields"),
        ("q.json", b'[{"a":\n"\xff"}]', ", line 2: not UTF-8 text: byte 0xff"),
        ("q.jsonl", b'{"a": 1}\n{"a": "\xff"}', ", line 2: not UTF-8 text: byte 0xff"),
        ("q.json", "[" * 100_000, ": not usable JSON"),
        ("q.jsonl", '{"a": 1}\n{"a": {"b": 1, "b": 2}}', ", line 2: not usable JSON: an object has two values of 'b'"),
        ("q.csv", "a,b", ": not a question file; give .json, .jsonl, .parquet"),
        ("q.parquet", "", ": not a readable Parquet file"),
        ("q.parquet", "PAR1 and nothing else", ": not a readable Parquet file"),
        ("q.pkl", pickle.dumps(RECORDS), ": not a question file"),
    ],
)
def test_malformed_files_are_named_with_the_place(write, name, content, complaint):
    path = write(name, content)
    with pytest.raises(UserError) as error:
        read_records(path)
    assert str(error.value).startswith(str(path)) and complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.json: there is no such question file"):
        read_records(tmp_path / "absent.json")


def test_a_file_with_a_corrupt_parquet_page_is_named(tmp_path):
    path = tmp_path / "q.parquet"
    pq.write_table(pa.table({"problem": [f"question {i}" for i in range(10_000)]}), path)
    content = bytearray(path.read_bytes())
    content[2000:2400] = b"\xff" * 400
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"q\.parquet"):
        read_records(path)


@pytest.mark.parametrize("kind", [pa.binary(), pa.list_(pa.binary()), pa.struct([("x", pa.large_binary())])])
def test_columns_of_bytes_are_refused(tmp_path, kind):
    """Such a column may hold pickled objects."""
    table = pa.table({"problem": pa.array(["?"]), "blob": pa.nulls(1, kind)})
    pq.write_table(table, tmp_path / "q.parquet")
    save_dataset(tmp_path / "saved", table, shards=1)
    for path in (tmp_path / "q.parquet", tmp_path / "saved"):
        with pytest.raises(UserError, match=r"column `blob` holds \w*binary, which is never read"):
            read_records(path)


def test_extension_columns_are_refused(tmp_path):
    pq.write_table(pa.table({"blob": pa.nulls(1, pa.uuid())}), tmp_path / "q.parquet")
    with pytest.raises(UserError, match="column `blob` holds extension"):
        read_records(tmp_path / "q.parquet")


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["?"]), pa.array(["1"]), pa.array(["2"])], ["problem", "answer", "answer"])
    pq.write_table(table, tmp_path / "q.parquet")
    with pytest.raises(UserError, match="two columns are named `answer`"):
        read_records(tmp_path / "q.parquet")


def test_a_column_may_be_named_binary(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"binary": {"extension": "x"}}]), tmp_path / "q.parquet")
    assert read_records(tmp_path / "q.parquet")[0].fields == {"binary": {"extension": "x"}}


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        (None, "", "not one saved by `datasets` (no state.json in it)"),
        ("dataset_dict.json", '{"splits": ["train", "test"]}', "holds several splits; name one: "),
        ("state.json", "{}", "no list `_data_files`"),
        ("state.json", "{", "state.json, line 1, column 2: not valid JSON"),
        ("state.json", '{"_data_files": [{"filename": "gone.arrow"}]}', "is missing"),
        ("state.json", '{"_data_files": [{"filename": "state.json"}]}', "state.json: not a readable Arrow file"),
    ],
)
def test_malformed_dataset_directories_are_named(tmp_path, file, content, complaint):
    path = tmp_path / "saved"
    path.mkdir()
    if file:
        (path / file).write_text(content)
    with pytest.raises(UserError) as error:
        read_records(path)
    assert str(path) in str(error.value) and complaint in str(error.value)
