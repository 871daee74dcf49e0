"""Every common schema gives the same Question; a malformed record is named by file, record and field."""

import math
import sys

import pytest

from nemo_disco.data.question_fields import Message
from nemo_disco.data.questions import load_questions
from nemo_disco.runtime.errors import UserError

MESSAGES = [{"role": "user", "content": "1+1?"}]


@pytest.mark.parametrize(
    "record",
    [
        {"problem": "1+1?", "answer": "2"},
        {"question": "1+1?", "answer": 2},
        {"problem": "1+1?", "answer": 2.0},
        {"prompt": "1+1?", "answer": ["2"]},
        {"prompt": MESSAGES, "reward_model": {"ground_truth": "2", "style": "rule"}},
        {"prompt": MESSAGES, "reward_model": {"ground_truth": [2, "2\n"]}},
        {"messages": MESSAGES, "answer": " 2 "},
        {"messages": [*MESSAGES, {"role": "assistant", "content": "2"}]},
        {"problem": None, "question": "1+1?", "answer": None, "reward_model": {"ground_truth": 2}},
    ],
)
def test_question_and_answer_fields_agree(write, record):
    (question,) = load_questions([write("q.json", [record])]).questions
    assert (question.text, question.answers) == ("1+1?", ("2",))
    assert question.messages == (Message("user", "1+1?"),)


def test_a_conversation_of_several_turns_is_kept(write):
    turns = [{"role": "system", "content": "Be brief."}, *MESSAGES, {"role": "assistant", "content": "The reference."}]
    (question,) = load_questions([write("q.json", [{"messages": turns, "answer": "2"}])]).questions
    assert question.text == question.messages == (Message("system", "Be brief."), Message("user", "1+1?"))
    assert question.answers == ("2",)


@pytest.mark.parametrize(
    ("answer", "answers"),
    [
        (70, ("70",)),
        (142.0, ("142",)),
        (-0.0, ("0",)),
        (0.5, ("0.5",)),
        (1e-5, ("0.00001",)),
        (-3.25, ("-3.25",)),
        (1e22, ("1" + "0" * 22,)),
        (100, ("100",)),
        (["a", " a", "b", "", None], ("a", "b")),
        (["9.6\n", 9.6], ("9.6",)),
    ],
)
def test_answers_are_converted_to_text(write, answer, answers):
    (question,) = load_questions([write("q.json", [{"problem": "?", "answer": answer}])]).questions
    assert question.answers == answers


def test_ids_count_all_records_of_all_files_and_metadata_keeps_the_rest(write):
    first = write("a.jsonl", [{"problem": "a", "answer": ""}, {"problem": "b", "answer": 1, "level": 5}])
    second = write("b.json", [{"problem": "c", "answer": 2}])
    loaded = load_questions([first, str(second)])
    assert [(q.id, q.text) for q in loaded.questions] == [(1, "b"), (2, "c")]
    assert loaded.questions[0].metadata == {"level": 5}
    assert [q.source for q in loaded.questions] == [f"{first}, line 2", f"{second}, record 1"]


def test_records_without_an_answer_are_left_out_and_named(write):
    answers = [1, None, "", math.nan, "  ", [], [None]]
    records = [{"problem": "?", "answer": a} for a in answers] + [{"problem": "?"}]
    path = write("q.json", records)
    loaded = load_questions([path])
    assert len(loaded.questions) == 1
    assert loaded.notes == (
        f"{path}: 1 of 8 records left out, `answer` is null: record 2",
        f"{path}: 5 of 8 records left out, `answer` is empty: record 3, record 4, record 5, record 6, record 7",
        f"{path}: 1 of 8 records left out, no answer field: record 8",
    )


def test_a_note_names_at_most_twenty_records(write):
    records = [{"problem": "?", "answer": 1}] + [{"problem": "?", "answer": None}] * 30
    (note,) = load_questions([write("q.json", records)]).notes
    assert "30 of 31" in note and note.endswith("record 21 and 10 more")


def test_a_file_without_any_answer_is_refused(write):
    with pytest.raises(UserError, match=r"q\.json: no record has an answer.*fields of the first: problem, result"):
        load_questions([write("q.json", [{"problem": "?", "result": "4"}])])


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"query": "?", "answer": 1}, "no question; expected one of the fields problem, question, prompt, messages, "),
        ({"problem": 7, "answer": 1}, "`problem` is of type int, not text"),
        ({"problem": " \n", "answer": 1}, "`problem` is empty"),
        ({"problem": "\ud800", "answer": 1}, "`problem` holds half of a surrogate pair"),
        ({"problem": "?", "answer": True}, "`answer` is True; an answer is text"),
        ({"problem": "?", "answer": {"value": 1}}, "`answer` is {'value': 1}; an answer is text"),
        ({"problem": "?", "answer": math.inf}, "`answer` is inf; an answer is text"),
        ({"problem": "?", "answer": [["1"]]}, "`answer` is ['1']; an answer is text"),
        ({"problem": "?", "answer": "\udfff"}, "`answer` holds half of a surrogate pair"),
        ({"prompt": MESSAGES, "reward_model": "2"}, "`reward_model` is of type str, not an object"),
        ({"prompt": [7], "answer": 1}, "`prompt[0]` is not an object with `role` and `content`"),
        ({"messages": [{"role": "human", "content": "?"}], "answer": 1}, "`messages[0].role` is 'human', not one of"),
        ({"messages": [{"role": "user", "content": 3}], "answer": 1}, "`messages[0].content` is of type int"),
        ({"messages": [], "answer": 1}, "`messages` holds no question"),
        ({"messages": [{"role": "system", "content": "x"}], "answer": 1}, "end it with a user's turn"),
        ({"messages": [{"role": "assistant", "content": "x"}], "answer": 1}, "`messages` holds no question"),
    ],
)
def test_malformed_records_name_file_record_and_field(write, record, complaint):
    path = write("q.json", [{"problem": "fine", "answer": 1}, record])
    with pytest.raises(UserError) as error:
        load_questions([path])
    assert str(error.value).startswith(f"{path}, record 2: ") and complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_no_files_are_refused():
    with pytest.raises(UserError, match="no question file"):
        load_questions([])


def test_an_integer_too_long_for_python_is_refused(write):
    digits = "7" * (sys.get_int_max_str_digits() + 1)
    with pytest.raises(UserError, match=r"q\.jsonl, line 1: not usable JSON"):
        load_questions([write("q.jsonl", f'{{"problem": "?", "answer": {digits}}}')])
