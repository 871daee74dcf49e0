"""Records of common question files: field names, solutions, content parts and tool turns; malformed ones are named."""

import json

import pytest

from nemo_disco.data import question_fields
from nemo_disco.data.question_fields import Message
from nemo_disco.data.questions import load_questions
from nemo_disco.runtime.errors import UserError

USER = {"role": "user", "content": "1+1?"}
GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nIn all she sold 48+24 = 72.\n#### 1,072"


@pytest.mark.parametrize(
    "record",
    [
        {"question": "1+1?", "solution": "2"},
        {"problem": "1+1?", "label": 2},
        {"problem": "1+1?", "final_answer": "2", "solution": "Long.\n" * 9},
        {"problem": "1+1?", "answers": ["2"]},
        {"problem": "1+1?", "reward_model": {"ground_truth": '["2"]'}},
        {"problem": "1+1?", "ground_truth": 2.0},
        {"problem": "1+1?", "expected_answer": "2", "solution": "Long.\n" * 9},
        {"ID": "7", "Problem": "1+1?", "Solution": "Long.\n" * 9, "Answer": 2},
        {"messages": json.dumps([USER, {"role": "assistant", "content": "2"}])},
        {"prompt": json.dumps([{"from": "human", "value": "1+1?"}]), "answer": "2"},
        {"question": ["1+1?"], "answer": ["2"]},
        {"question": [USER], "answer": ["2"]},
        {"problem": "1+1?", "answer": "One and one.\n#### 2\n"},
        {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
        {"conversations": [{"from": "Human", "value": "1+1?"}, {"from": "GPT", "value": "2"}]},
        {"conversations": [USER], "answer": "2"},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "1+1?"}]}], "answer": "2"},
        {"messages": [USER, {"role": "assistant", "content": ""}], "answer": "2"},
        {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "So\n#### 2"}]}]},
    ],
)
def test_common_schemas_give_the_same_question(write, record):
    (question,) = load_questions([write("q.json", [record])]).questions
    assert (question.text, question.answers) == ("1+1?", ("2",))


@pytest.mark.parametrize("name", ["q.json", "q.jsonl"])
def test_a_record_of_columns_gives_one_question_for_each_row(write, name):
    columns = {"question": ["1+1?", "1+2?"], "answer": ["2", ["3", "three"]], "level": [5, 6], "source": "x"}
    path = write(name, json.dumps(columns))
    questions = load_questions([path]).questions
    assert [(q.text, q.answers, q.id) for q in questions] == [("1+1?", ("2",), 0), ("1+2?", ("3", "three"), 1)]
    assert questions[1].metadata == {"level": 6, "source": "x"}
    assert questions[1].source.endswith(", item 2")


def test_final_answers_are_extracted_from_gsm8k_solutions_and_noted(write):
    path = write("q.jsonl", [{"question": "How many?", "answer": GSM8K}, {"question": "?", "answer": "7"}])
    loaded = load_questions([path])
    assert [q.answers for q in loaded.questions] == [("1072",), ("7",)]
    assert loaded.notes == (f"{path}: 1 of 2 answers are whole solutions: what follows #### is the answer",)


def test_every_form_of_gsm8k_solution_is_read(write):
    """20 records like those of openai/gsm8k: calculator marks, blank lines, thousands, signs, decimals, line ends."""
    ends = ["72", "10", "5", "-42", "624", "1,450", "160,000", "1,234,567", "0", "3.5", "-1,000", "12.50", "$18", "25%"]
    ends += ["7 ", " 8", "1/2", "109,200,000", "6", "990"]
    solution = (
        "She sold 48/2 = <<48/2=24>>24 clips #1.\n\nThat is 24*{i} = <<24*{i}=0>>many, not #### 3.\n#### {end}{cr}"
    )
    records = [
        {"question": f"How many in week {i}?", "answer": solution.format(i=i, end=end, cr="\r\n" if i % 5 == 0 else "")}
        for i, end in enumerate(ends)
    ]
    loaded = load_questions([path := write("gsm8k.jsonl", records)])
    plain = [end.strip() if end.startswith("$") or "%" in end else end.strip().replace(",", "") for end in ends]
    assert [q.answers for q in loaded.questions] == [(end,) for end in plain]
    assert loaded.notes == (f"{path}: 20 of 20 answers are whole solutions: what follows #### is the answer",)


def test_a_long_solution_needs_a_final_answer(write):
    solutions = ["So it is\n\\boxed{42}.", "It can be shown\nthat it is 42.", "42"]
    path = write("q.json", [{"problem": "?", "solution": s} for s in solutions])
    loaded = load_questions([path])
    assert [q.answers for q in loaded.questions] == [(solutions[0],), ("42",)]  # the graders read the box
    left_out, boxed = loaded.notes
    assert "1 of 3 records left out" in left_out and left_out.endswith("record 2")
    assert "the last \\boxed{} is the answer" in boxed


def test_a_long_reference_turn_needs_a_final_answer(write):
    turns = [[USER, {"role": "assistant", "content": c}] for c in ("So\nit is 2.", "So\n\\boxed{2}", "2")]
    loaded = load_questions([write("q.json", [{"messages": t} for t in turns])])
    assert [q.answers for q in loaded.questions] == [("So\n\\boxed{2}",), ("2",)]
    assert "1 of 3 records left out, `messages` has no final answer" in loaded.notes[0]


def test_long_prose_as_an_answer_is_noted_but_code_tests_are_not(write):
    prose, code = "It can be shown that it is so. " * 20, "assert f(1) == 2\n" * 30
    path = write("q.json", [{"problem": "?", "answer": a} for a in (prose, code, "2", json.dumps({"inputs": [code]}))])
    loaded = load_questions([path])
    assert len(loaded.questions) == 4
    (note,) = loaded.notes
    assert "1 of 4 answers are longer than 300 characters" in note


def test_tool_turns_and_empty_assistant_turns_are_kept(write):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    turns = [USER, call, {"role": "tool", "content": "2", "name": "add", "tool_call_id": None}]
    (question,) = load_questions([write("q.json", [{"messages": turns, "answer": "2"}])]).questions
    assert question.messages == (
        Message("user", "1+1?"),
        Message("assistant", "", {"tool_calls": [{"function": {"name": "add"}}]}),
        Message("tool", "2", {"name": "add"}),
    )


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "human", "value": "1+1?"}], "system": "Be brief."},
        {"question": "1+1?", "system": "Be brief."},
        {"problem": "1+1?", "system_prompt": [{"type": "text", "text": "Be brief."}], "system": ""},
        {"messages": [SYSTEM, USER], "system": "Be brief.\n"},
        {"messages": [SYSTEM, USER], "system": None},
    ],
)
def test_a_system_prompt_in_its_own_field_becomes_a_turn(write, record):
    (question,) = load_questions([write("q.json", [record | {"answer": "2"}])]).questions
    assert question.messages == (Message("system", "Be brief."), Message("user", "1+1?"))
    assert not {"system", "system_prompt"} & question.metadata.keys()


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "'image_url'; only"),
        ({"messages": [{"role": "user", "content": [{"text": " "}]}]}, "`messages[0].content` is empty"),
        ({"messages": [{"role": "tool", "content": "2"}], "answer": 1}, "holds no question"),
        ({"conversations": [{"from": "alien", "value": "?"}], "answer": 1}, "`conversations[0].from` is 'alien'"),
        ({"question": ["a", "b"], "answer": ["1"]}, "`question` lists 2 questions, and there are answers to 1 of them"),
        ({"question": ["a", "b"], "answer": "1", "level": [1, 2]}, "there are answers to 1 of them"),
        ({"problem": "?", "answer": "#### "}, "`answer` ends in `####`, and no answer follows it"),
        ({"problem": "?", "answer": "So it is.\n####\n"}, "`answer` ends in `####`, and no answer follows it"),
        ({"messages": "[{'role': 'user', 'content': '?'}]"}, "`messages` is a text; give a list of turns"),
        ({"question": "?", "system": 7}, "`system` is of type int, not text"),
        ({"messages": [SYSTEM, USER], "system": "Be long."}, "`system` and `messages[0]` are two system prompts"),
    ],
)  # fmt: skip
def test_a_malformed_field_is_named(write, record, complaint):
    with pytest.raises(UserError) as error:
        load_questions([write("q.json", [{"answer": 1} | record])])
    assert complaint in str(error.value)


def test_malformed_records_are_left_out_and_named_up_to_a_share(write):
    lines = [f'{{"problem": "?", "answer": {i}}}' for i in range(20)]
    lines[4], lines[8] = '{"problem": 7, "answer": 1}', '{"problem": "\xff'
    path = write("q.jsonl", "\n".join(lines).encode("latin-1"))
    loaded = load_questions([path])
    assert [q.id for q in loaded.questions] == [i for i in range(20) if i not in (4, 8)]
    (note,) = loaded.notes
    assert "2 of 20 records left out, malformed: line 5, line 9; the first: " in note and "`problem` is of type" in note
    with pytest.raises(UserError, match=r"line 5: `problem` is .*2 of 20 records are malformed; data\.max_bad_records"):
        load_questions([path], max_bad_records=0.09)


def test_an_integer_larger_than_any_float_is_an_answer():
    assert question_fields.answer_text("F", "answer", 10**400) == "1" + 400 * "0"


@pytest.mark.parametrize("sender", [["human"], {"a": 1}, None])
def test_an_unknown_sender_is_named(sender):
    with pytest.raises(UserError, match=r"conversations\[0\]\.from"):
        question_fields.read_question("F", {"conversations": [{"from": sender, "value": "x"}]})
