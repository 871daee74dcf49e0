"""Any override and any config file is applied or refused in one printable line, without a traceback or a hang."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from in_process import run_in_process

from nemo_disco.config.compose import compose, load_run_config, to_yaml
from nemo_disco.config.consistency import check_consistency
from nemo_disco.config.known_keys import known_keys
from nemo_disco.runtime.errors import MAX_MESSAGE, UserError

PREFIXES = ("", "+", "++", "~")
ODD_KEYS = ("defaults", "hydra", "hydra.searchpath", "", "model.", ".model", "algorithm@x", "/algorithm", "seed.x")
ODD_VALUES = [
    *("null", "{}", "[]", "''", "???", "[???]", "{a: ???}", "{null: 1}", "{1: 2}", "[[[[]]]]", "{a: {b: {c: 1}}}"),
    *(
        "1e999",
        "-1",
        "99999999999",
        "1" + "0" * 30,
        "1" + "0" * 5000,
        "nan",
        "inf",
        "true",
        "1_000",
        "1:30",
        "2024-01-01",
    ),
    *("${", "${}", "${x}", "${..x}", "${seed}", "${model}", "${assets:}", "${oc.env:NOWHERE}", "${oc.decode:[}"),
    *("choice(1,2)", "range(1,3)", "glob(*)", "int(x)", "json_str('{')", "!!binary x", "a,b", "a b", "'a", "\\", "="),
    *("\ud800", "'\ud800'", "\x00", "'\x00'", "\n", "é", ""),
]
OVERRIDES = st.builds(
    lambda prefix, key, equals, value: f"{prefix}{key}{equals}{value}",
    st.sampled_from(PREFIXES),
    st.sampled_from([*known_keys(), *ODD_KEYS]) | st.text(max_size=8),
    st.sampled_from(["=", "=", "=", ""]),
    st.sampled_from(ODD_VALUES) | st.text(max_size=12) | st.integers().map(str) | st.floats().map(str),
)


def assert_applied_or_refused(read) -> None:
    """Call `read`, which must return or raise UserError with one short printable line."""
    try:
        read()
        line = ""
    except UserError as error:
        line = str(error)
    assert len(line) < MAX_MESSAGE + 20
    assert not line or line.isprintable()


@settings(max_examples=40, deadline=20_000, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(OVERRIDES)
def test_any_override_is_applied_or_refused_in_one_line(override):
    run_in_process(["plan", "--config-name=quickstart", override])


INTERPOLATIONS = ", ".join(f'a{i}: "{f"${{.a{i - 1}}}" * 10}"' for i in range(1, 12))
# Each value is ten times the one before, so that the last would have 10^12 characters.
EXPONENTIAL = f"algorithm.parameters={{a0: 0123456789, {INTERPOLATIONS}}}"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model=null", "model has no choice None; known: "),
        ("+evaluation=null", "evaluation has no choice None; known: "),
        ("model.path='\ud800'", r"model.path: \ud800 has a lone surrogate"),
        ("trainer.gradient_clip_val='\ud800'", r"trainer.gradient_clip_val: \ud800 has a lone surrogate"),
        ("data.train_files=['\ud800']", r"data.train_files: \ud800 has a lone surrogate"),
        (
            "data.questions_per_step=99999999999",
            "data.questions_per_step: expected at most 2147483647, got 99999999999",
        ),
        ("seed=" + "1" * 5000, "Exceeds the limit (4300 digits)"),
        ("data.train_files=[???]", "data.train_files must be given"),
        ("algorithm.parameters={1: 2}", "algorithm.parameters: the name 1 is not text; put it in quotes"),
        ("seed=${model}", "seed: expected an integer of at least 0, got {"),
        ("seed=${seed}", "seed: its interpolations refer to itself"),
        ("model.optim.eps=${..optim}", "its interpolations refer to itself"),
        (EXPONENTIAL, "its interpolations refer to more than 1,000,000 characters"),
    ],
)
def test_input_that_once_gave_a_traceback_or_a_hang(override, line):
    with pytest.raises(UserError) as raised:
        check_consistency(compose("quickstart", [override]), 2)
    assert line in str(raised.value)
    assert len(str(raised.value)) < 700  # a section of keys or a long number is shortened


def test_divisors_of_a_huge_number_are_found_quickly():
    with pytest.raises(UserError, match=r"would work: 1, 2, 3, 6, 7, 9, 11, [0-9, ]{20,40}$"):
        check_consistency(
            compose("quickstart", ["data.questions_per_step=2147483646", "algorithm.mini_batch_questions=5"]), 2
        )


# YAML whose aliases expand to 9^10 values.
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
FILES = [
    *(
        "defaults: x",
        "defaults: {a: 1}",
        "defaults: [1]",
        "defaults: null",
        "defaults: [bad]",
        "3",
        "",
        "[]",
        "\0",
        "\t",
    ),
    *("<<: 3", "a: 1\n---\nb: 2", "? [a, b]\n: 1", "1: 2", "null: 2", "[" * 2000, "{a: " * 600 + "1" + "}" * 600),
    *(
        f"seed: {value}"
        for value in ("!!binary aGk=", "2024-01-01", "!!set {a, b}", "!!omap [a: 1]", "!!int x", "!foo x")
    ),
    *("model: null", "model: &m {path: *m}", 'model: {path: "\\uD800"}', "model: {path: !!binary aGk=}", "seed: '${'"),
    *("algorithm: {parameters: {1: 2}}", "algorithm: {parameters: {a: !!timestamp x}}", "hydra: {searchpath: 3}", BOMB),
]


@pytest.mark.parametrize("text", FILES, ids=range(len(FILES)))
def test_any_config_file_is_applied_or_refused_in_one_line(tmp_path, text):
    bad = tmp_path / "bad.yaml"
    for content in (text, f"defaults: [quickstart, _self_]\n{text}"):
        bad.write_text(content)
        assert_applied_or_refused(lambda: compose("bad", [], str(tmp_path)))
        assert_applied_or_refused(lambda: load_run_config(bad))


@pytest.mark.parametrize("text", [BOMB, "model: &m [*m]\n"])
def test_aliases_that_expand_to_too_much_are_refused_naming_the_file(tmp_path, text):
    bad = tmp_path / "bad.yaml"
    bad.write_text(text)
    for read in (lambda: compose("bad", [], str(tmp_path)), lambda: load_run_config(bad)):
        with pytest.raises(UserError, match=r"bad\.yaml: its YAML aliases expand to more than 100,000 values"):
            read()


def test_aliases_that_expand_to_little_are_accepted(tmp_path):
    text = to_yaml(compose("quickstart"))
    (tmp_path / "config.yaml").write_text(
        text.replace("seed: 1", "seed: &n 3").replace("max_steps: 60", "max_steps: *n")
    )
    config = load_run_config(tmp_path / "config.yaml")
    assert config.seed == config.trainer.max_steps == 3


def test_a_config_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"seed: \xff\n")
    with pytest.raises(UserError, match=r"config\.yaml: not UTF-8 text"):
        load_run_config(tmp_path / "config.yaml")
