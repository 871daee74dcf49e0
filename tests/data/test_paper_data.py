"""The papers' own question files (collected only if they are present): every record is loaded or named."""

import pytest

from nemo_disco.data.chat import encode_prompts
from nemo_disco.data.questions import load_questions

TEST_SIZES = {
    "aime": 30,
    "aime25": 30,
    "amc": 83,
    "gsm8k": 1319,
    "math": 500,
    "minerva": 272,
    "olympiad_bench": 675,
}
SUFFIX = "Let's think step by step and output the final answer within \\boxed{}."


@pytest.mark.parametrize("name", TEST_SIZES)
def test_the_json_file_and_the_verl_file_hold_the_same_questions(name, tokenizer, paper_data):
    """With the suffix, the JSON file's prompts equal those of the papers' own Parquet files."""
    plain = load_questions([paper_data / "test" / f"{name}.json"])
    verl = load_questions([paper_data / "parquet" / f"{name}.parquet"])
    assert len(plain.questions) == len(verl.questions) == TEST_SIZES[name]
    assert plain.notes == verl.notes == ()
    assert [q.answers for q in plain.questions] == [q.answers for q in verl.questions]
    prompts = [encode_prompts(tokenizer, part.questions[:50], SUFFIX, 10_000, "error")[0] for part in (plain, verl)]
    assert [p.token_ids for p in prompts[0]] == [p.token_ids for p in prompts[1]]


def test_training_records_are_loaded_or_named(paper_data):
    loaded = load_questions([paper_data / "train" / "aime.json", paper_data / "train" / "math.json"])
    assert len(loaded.questions) + 4 == loaded.questions[-1].id + 1 == 8449
    math = paper_data / "train" / "math.json"
    assert loaded.notes == (
        f"{math}: 2 of 7474 records left out, `answer` is null: record 887, record 1010",
        f"{math}: 2 of 7474 records left out, `answer` is empty: record 5329, record 5331",
    )
