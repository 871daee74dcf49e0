"""A chat template is a program: it ends in a prompt or in an error of one line, within a limited time."""

import threading

import pytest

from nemo_disco.data import template_rendering
from nemo_disco.data.chat import encode_prompts
from nemo_disco.data.question_fields import Message
from nemo_disco.data.questions import Question
from nemo_disco.runtime.errors import UserError

NESTED = "".join(f"{{% for {c} in range(99999) %}}" for c in "abcd") + "{% endfor %}" * 4


def render_prompts(tokenizer, question="1+1?", **settings):
    """The question's prompt as text, in a list."""
    questions = [Question(0, question, ("2",), "q.json, record 1")]
    encoded, _ = encode_prompts(tokenizer, questions, "", 1000, "error", **settings)
    return [tokenizer.decode(prompt.token_ids) for prompt in encoded]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{{ 1 + 'a' }}", "fails with TypeError"),
        ("{{ 1 // 0 }}", "fails with ZeroDivisionError"),
        ("{{ 'a' * 10 ** 15 }}", "fails with MemoryError"),
        ("{{ 'a' * 10 ** 10 }}", "fails with MemoryError"),  # many a machine has that much memory
        ("{{ 'a' * 10 ** 8 }}", "100,000,000 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails with RecursionError"),
        ("{{ messages[7].content.x }}", "refuses this question: "),
        ("{% for", "refuses this question: "),
        ("{{ '\\ud800' }}", "fails with UnicodeEncodeError"),
    ],
)  # fmt: skip
def test_a_failing_template_is_reported_in_one_line(tokenizer, text, complaint):
    tokenizer.chat_template = text
    with pytest.raises(UserError) as error:
        render_prompts(tokenizer)
    line = str(error.value)
    assert line.startswith("q.json, record 1: the tokenizer's chat template") and complaint in line
    assert "\n" not in line and len(line) < 500


@pytest.mark.parametrize("text", [NESTED, "{{ 10 ** (10 ** 10) }}"])  # the second never leaves Python's own C code
def test_an_endless_template_is_stopped_in_any_thread(tokenizer, text, monkeypatch):
    monkeypatch.setattr(template_rendering, "CPU_SECONDS", 1)
    tokenizer.chat_template = text
    lines = []

    def ask():
        with pytest.raises(UserError) as error:
            render_prompts(tokenizer)
        lines.append(str(error.value))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(timeout=120)
    assert "does not end: stopped after 1 s" in lines[0]


def test_arguments_and_a_system_prompt_reach_the_template(tokenizer):
    tokenizer.chat_template += "{% if not enable_thinking | default(true) %}</think>{% endif %}"
    thinking = render_prompts(tokenizer)
    not_thinking = render_prompts(tokenizer, template_arguments={"enable_thinking": False})
    assert not_thinking == [thinking[0] + "</think>"]
    assert render_prompts(tokenizer, system="Be brief.") == ["<system>Be brief.\n<user>1+1?\n<assistant>"]
    turns = (Message("system", "Own."), Message("user", "1+1?"))
    assert render_prompts(tokenizer, turns, system="Be brief.") == ["<system>Own.\n<user>1+1?\n<assistant>"]


@pytest.mark.parametrize("name", ["enable_thinkng", "tokenize", "messages"])
def test_an_unknown_or_reserved_argument_is_refused(tokenizer, name):
    tokenizer.chat_template += "{# enable_thinking tokenize #}"
    with pytest.raises(UserError, match=rf"data\.chat_template_kwargs\.{name}: "):
        render_prompts(tokenizer, template_arguments={name: False})


def test_tool_turns_reach_the_template(tokenizer):
    tokenizer.chat_template = (
        "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}({{ c.name }}){% endfor %}{% endfor %}<assistant>"
    )
    turns = (
        Message("user", "1+1?"),
        Message("assistant", "", {"tool_calls": [{"name": "add"}]}),
        Message("tool", "2"),
    )
    question = Question(0, turns, ("2",), "q", {"tools": [{"name": "add"}]})
    (prompt,), _ = encode_prompts(tokenizer, [question], "Box it.", 1000, "error")
    assert tokenizer.decode(prompt.token_ids) == "[add]<user>1+1? Box it.<assistant>(add)<tool>2<assistant>"
