"""`nemo-disco data`: every fault is named, filters remove only their questions, and all formats are equivalent."""

import json

import pytest

from nemo_disco import cli
from nemo_disco.data.questions import load_questions
from nemo_disco.data.survey import (
    describe,
    filter_questions,
    pass_rates,
    survey_questions,
    text_key,
    write_questions,
)
from nemo_disco.runtime.errors import UserError

RECORDS = [
    {"problem": "What is $1+1$?", "answer": "2", "level": 1},
    {"problem": "what is 1 + 1", "answer": "2"},
    {"problem": "What is \\( 1+1 \\)?  Let's think step by step and output the answer.", "answer": 3},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a set."}],
     "answer": ["\\{1\\}", "1"]},
    {"prompt": [{"role": "user", "content": "A long one: " + "x" * 300}], "reward_model": {"ground_truth": "x^{"}},
]  # fmt: skip


@pytest.fixture
def survey(write):
    """Survey of RECORDS against an evaluation file, with a stub of the tokenizer and of the math grader."""
    held_out = write("test.json", [{"problem": "Name a  SET", "answer": "1"}, {"problem": "Other?", "answer": "1"}])
    return survey_questions(
        [write("train.jsonl", RECORDS)],
        against=[held_out],
        count_tokens=lambda questions: [len(q.messages[-1].content) for q in questions],
        find_unparsable=lambda answers: ["unparsable answer" if a == "x^{" else "" for a in answers],
    )


def test_the_survey_has_every_fault(survey):
    assert survey.duplicates == {1: 0, 2: 0}
    assert survey.conflicting == [2]
    assert {i: q.text for i, q in survey.contaminated.items()} == {3: "Name a  SET"}
    assert survey.unparsable == {4: "unparsable answer"}
    assert [i for i, n in enumerate(survey.lengths) if n > 100] == [4]


def test_the_description_names_records(survey):
    text = describe(survey)
    assert "5 questions" in text and "max 312" in text
    assert "duplicates (repeating an earlier question): 2 of 5" in text and "line 3 = " in text
    assert "x^{" in text and "contaminated (also in an evaluation file): 1 of 5" in text


@pytest.mark.parametrize(
    ("drop", "tokens", "expected"),
    [
        ([], None, [0, 1, 2, 3, 4]),
        (["duplicates"], None, [0, 3, 4]),
        (["contaminated"], None, [0, 1, 2, 4]),
        (["unparsable"], None, [0, 1, 2, 3]),
        ([], 311, [0, 1, 2, 3]),
        (["duplicates", "contaminated"], 312, [0, 4]),
    ],
)
def test_each_filter_removes_only_its_questions(survey, drop, tokens, expected):
    remaining, notes = filter_questions(survey, drop, tokens)
    assert [q.id for q in remaining] == expected
    assert bool(notes) == (len(expected) < 5)


def test_questions_that_are_always_right_or_always_wrong_are_removed(write):
    verdicts = {"What is $1+1$?": [True, True], "Name a set.": [False], "A long one: " + "x" * 300: [True, False]}
    lines = [{"question": q, "correct": v} for q, values in verdicts.items() for v in values]
    rollouts = [write("step_1.jsonl", lines[:2]), write("step_2.jsonl", lines[2:])]
    survey = survey_questions([write("train.jsonl", RECORDS)], rollouts=rollouts)
    assert survey.pass_rates == {0: 1.0, 1: 1.0, 2: 1.0, 3: 0.0, 4: 0.5}
    assert [q.id for q in filter_questions(survey, [], None)[0]] == [4]
    assert "always wrong 1, always right 3" in describe(survey)
    # A question without rollouts stays.
    assert len(filter_questions(survey_questions([write("new.json", [RECORDS[3], {"problem": "New", "answer": 1}])],
                           rollouts=rollouts), [], None)[0]) == 1  # fmt: skip


def test_rollouts_match_a_question_with_a_system_prompt(write):
    (question,) = load_questions([write("q.json", [RECORDS[3]])]).questions
    rollouts = write("step_1.jsonl", [{"question": question.user_text, "correct": True}])  # as runs write them
    assert survey_questions([write("q.json", [RECORDS[3]])], rollouts=[rollouts]).pass_rates == {0: 1.0}


def test_malformed_records_are_noted_however_many_they_are(write):
    bad = write("bad.jsonl", [{"problem": 7, "answer": 1}, {"problem": 8, "answer": 1}, RECORDS[0]])
    survey = survey_questions([bad], against=[bad])
    assert len(survey.questions) == 1
    # The file is read twice, as training file and as evaluation file.
    assert len([note for note in survey.notes if "2 of 3 records left out, malformed" in note]) == 2


def test_a_line_that_is_no_rollout_is_named(write):
    with pytest.raises(UserError, match=r"x\.jsonl, line 2: not a rollout; give `question`"):
        pass_rates([write("x.jsonl", [{"question": "a", "correct": True}, {"question": "a"}])])


@pytest.mark.parametrize("name", ["out.jsonl", "out.json", "out.parquet"])
def test_converted_questions_are_the_same_questions(name, write, tmp_path):
    records = RECORDS[:3] if name == "out.parquet" else RECORDS  # a column of Parquet holds one schema
    before = load_questions([write("train.jsonl", records)]).questions
    write_questions(tmp_path / name, before)
    after = load_questions([tmp_path / name]).questions
    assert [(q.messages, q.answers) for q in after] == [(q.messages, q.answers) for q in before]
    assert after[0].metadata["level"] in (1, "1")


def test_unusable_targets_are_refused(survey, tmp_path):
    with pytest.raises(UserError, match=r"name it \.jsonl, \.json, \.parquet"):
        write_questions(tmp_path / "out.csv", survey.questions)
    with pytest.raises(UserError, match="the filters left no question"):
        write_questions(tmp_path / "out.json", [])


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Find $\\frac{1}{2}$.", "find \\dfrac{1}{2}", True),
        ("Find 1.5", "Find 15", False),
        ("Find x^2", "Find x2", False),
        ("Is 3 < 5?", "Is 3 > 5?", False),
        ("a. b", "a b", True),
    ],
)
def test_the_key_ignores_only_typesetting(one, other, same):
    assert (text_key(one) == text_key(other)) is same


def test_the_command_prints_and_writes(write, tokenizer_dir, tmp_path, capsys):
    file, out = write("train.jsonl", RECORDS), tmp_path / "out.json"
    options = ["--drop", "unparsable", "--max-tokens", "300"]
    assert cli.main(["data", str(file), "--model", str(tokenizer_dir), "--out", str(out), *options]) == 0
    printed = capsys.readouterr().out
    assert "prompt tokens: min" in printed and "(unparsable answer): x^{" in printed
    assert f"{out}: 4 questions" in printed and len(json.loads(out.read_text())) == 4


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--drop", "duplicates"], "name the file with --out"),
        (["--drop", "contaminated", "--out", "clean.jsonl"], "name them with --against"),
    ],
)
def test_a_filter_that_could_do_nothing_is_refused(write, capsys, options, line):
    file = write("q.jsonl", RECORDS[:1])
    assert cli.main(["data", str(file), *options]) == 2
    assert line in capsys.readouterr().err


def test_rollouts_of_other_questions_are_noted(write, tmp_path, capsys):
    file = write("q.jsonl", RECORDS[:1])
    rollouts = tmp_path / "step_1.jsonl"
    rollouts.write_text('{"question": "What is 2 + 2?", "correct": true}\n')
    assert cli.main(["data", str(file), "--rollouts", str(rollouts)]) == 0
    out = capsys.readouterr().out
    assert "none of the 1 questions in the rollouts" in out and "contaminated" not in out
