"""Fields beside a question that would change the prompt are used, refused or noted; none is dropped in silence."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_disco.data.chat import encode_prompts
from nemo_disco.data.questions import load_questions
from nemo_disco.data.survey import write_questions
from nemo_disco.runtime.errors import UserError

ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
THINKS = "{% if not enable_thinking | default(true) %}</think>{% endif %}"
TOOLS = "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"


@pytest.fixture
def make_prompts(write, tokenizer):
    """A function that returns the prompts of records, or of a file, as text, and all notes."""

    def encode(*records, template="", name="q.json", **settings):
        tokenizer.chat_template += template
        path = name if not isinstance(name, str) else write(name, [{"answer": "2"} | record for record in records])
        loaded = load_questions([path])
        encoded, notes = encode_prompts(tokenizer, loaded.questions, "", 1000, "error", **settings)
        return [tokenizer.decode(prompt.token_ids) for prompt in encoded], [*loaded.notes, *notes]

    return encode


def test_a_records_template_arguments_override_the_configs(make_prompts):
    records = [
        {"problem": "a"},
        {"problem": "b", "enable_thinking": True},
        {"problem": "c", "chat_template_kwargs": {"enable_thinking": False, "depth": None}},
        {"problem": "d", "chat_template_kwargs": '{"enable_thinking": true}'},
    ]
    texts, notes = make_prompts(*records, template=THINKS, template_arguments={"enable_thinking": False})
    assert [prompt.endswith("</think>") for prompt in texts] == [True, False, True, False]
    assert not notes


def test_each_field_that_the_template_does_not_read_is_noted_once(make_prompts):
    records = [{"problem": c, "enable_thinking": False, "tools": [ADD]} for c in "ab"]
    _, notes = make_prompts(*records, template="{# enable_thinking #}{% set enable_thinking_ = thinking_tools %}")
    assert len(notes) == 2
    assert all("2 of 2 prompts are without `" in line and "record 1" in line for line in notes)
    assert "chat_template_kwargs.enable_thinking" in notes[0] and "tools" in notes[1]


def test_turns_that_the_template_drops_are_noted(make_prompts, tokenizer):
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    calls = [{"function": {"name": "add"}}]
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    turns.append({"role": "tool", "content": "two"})
    _, notes = make_prompts({"messages": turns}, system="Be brief.")
    assert len(notes) == 3
    for part in ("`tool_calls`", "a system turn", "a tool turn"):
        assert sum(part in line for line in notes) == 1


def test_tools_reach_the_template_from_every_file_format(make_prompts, write, tmp_path):
    """Tools may also be JSON text, or be in a table, where each row has the field names of all rows."""
    other = {"type": "function", "function": {"name": "sub", "strict": True}}
    records = [{"problem": "a", "answer": "2", "tools": [ADD]}, {"problem": "b", "answer": "2", "tools": [other]}]
    table, text = tmp_path / "t.parquet", tmp_path / "out.parquet"
    pq.write_table(pa.Table.from_pylist(records), table)
    write_questions(text, load_questions([write("q.json", records)]).questions)
    for path in (write("q.json", records), table, text):
        assert [q.metadata["tools"] for q in load_questions([path]).questions] == [[ADD], [other]]
    texts, notes = make_prompts(template=TOOLS, name=text)
    assert [prompt.rpartition(">")[2] for prompt in texts] == ["[add]", "[sub]"] and not notes


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"images": ["a.png"]}, "`images` is part of the question, and only text is read"),
        ({"image_1": {"path": "a.png"}}, "`image_1` is part of the question"),
        ({"tools": "add"}, "`tools` is 'add', which is not JSON"),
        ({"tools": ["{}", 7]}, "`tools` is ['{}', 7]; give a list of JSON schemas"),
        ({"tools": {"name": "add"}}, "give a list of JSON schemas"),
        ({"chat_template_kwargs": [1]}, "`chat_template_kwargs` is [1]; give a mapping"),
        ({"enable_thinking": "no"}, "`enable_thinking` is 'no', which is not JSON"),
        ({"enable_thinking": 1}, "`enable_thinking` is 1; give true or false"),
    ],
)
def test_a_field_that_cannot_be_used_is_refused_by_name(write, fields, complaint):
    with pytest.raises(UserError) as error:
        load_questions([write("q.json", [{"problem": "?", "answer": 1} | fields])])
    assert "record 1: " in str(error.value) and complaint in str(error.value)


def test_an_argument_that_the_program_sets_is_refused(make_prompts):
    with pytest.raises(UserError, match=r"record 1: chat_template_kwargs\.tokenize: set by this program"):
        make_prompts({"problem": "a", "chat_template_kwargs": {"tokenize": True}})


def test_a_misspelt_argument_is_refused_even_if_it_is_part_of_another_name(make_prompts):
    with pytest.raises(UserError, match=r"data\.chat_template_kwargs\.thinking: "):
        make_prompts({"problem": "a"}, template=THINKS, template_arguments={"thinking": False})


def test_each_field_that_is_not_part_of_the_prompt_is_noted_once(write):
    full = {"context": "A rope of 3 m.", "options": ["1", "2"], "images": [], "input": "", "tools": None, "Body": "x"}
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "2"}]
    records = [
        {"problem": "?", "answer": "2", "messages": turns} | full,
        {"problem": "!", "answer": "1", "prompt": "No!"},
    ]
    notes = load_questions([write("q.json", records)]).notes
    assert len(notes) == 4  # none on `messages`, which holds the same question
    for name in ("context", "options", "Body", "prompt"):
        assert sum(f"1 of 2 records have `{name}` beside the question" in note for note in notes) == 1


def test_converted_files_give_the_same_prompts(make_prompts, tmp_path):
    records = [
        {"question": "a", "system": "S", "enable_thinking": False, "tools": [ADD]},
        {"question": "b", "Answer": 1},
    ]
    before = make_prompts(*records, template=TOOLS + THINKS)
    for name in ("out.jsonl", "out.json", "out.parquet"):
        write_questions(tmp_path / name, load_questions([tmp_path / "q.json"]).questions)
        assert make_prompts(name=tmp_path / name) == before
    assert json.loads((tmp_path / "out.json").read_text())[0]["chat_template_kwargs"] == {"enable_thinking": False}
