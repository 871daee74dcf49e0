"""Composition of a configuration: effects of overrides, the search path, and one clear line for each mistake."""

import math
from pathlib import Path

import pytest

from nemo_disco.config import paths
from nemo_disco.config.compose import compose, load_run_config, overridden_keys, to_yaml
from nemo_disco.runtime.errors import UserError


def test_overrides_and_groups_set_their_keys():
    config = compose(
        "quickstart",
        ["trainer.max_steps=3", "model.optim.lr=2e-6", "algorithm=grpo", "data.train_files=[a.json,b.json]"],
    )
    assert config.trainer.max_steps == 3
    assert config.model.optim.lr == 2e-6
    assert config.data.train_files == ["a.json", "b.json"]
    assert config.algorithm.name == "grpo"
    assert config.algorithm.constraint["delta"] is None  # the quickstart's delta is for DisCO's methods alone


@pytest.mark.parametrize(
    ("override", "is_applied"),
    [
        ("trainer.precision=32", lambda c: c.trainer.precision == "32"),
        ("algorithm.lambda=inf", lambda c: math.isinf(c.algorithm.objective()["lambda"])),
        ("++trainer.max_steps=4", lambda c: c.trainer.max_steps == 4),
        ("seed=${trainer.max_steps}", lambda c: c.seed == c.trainer.max_steps),
        ("algorithm.name=my_module:Mine", lambda c: c.algorithm.name == "my_module:Mine"),
        ("model.optim={lr: 1}", lambda c: c.model.optim.lr == 1.0 and c.model.optim.eps == 1e-8),
        ('exp_manager.explicit_log_dir="a=b c"', lambda c: c.exp_manager.explicit_log_dir == "a=b c"),
    ],
)
def test_hydra_syntax(override, is_applied):
    assert is_applied(compose("quickstart", [override]))


def test_a_tilde_is_the_home_directory_wherever_a_path_begins(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    overrides = ["model.path=~/m", "data.train_files=[~/a.json,b.json]", "exp_manager.explicit_log_dir='~/r'"]
    config = compose("quickstart", overrides)
    assert (config.model.path, config.exp_manager.explicit_log_dir) == ("/home/ada/m", "/home/ada/r")
    assert config.data.train_files == ["/home/ada/a.json", "b.json"]
    assert compose("quickstart", ['data.prompt_suffix="[~/a,~/b]"']).data.prompt_suffix == "[~/a,~/b]"  # not a path


@pytest.mark.parametrize(
    ("override", "quoted"),
    [
        ("data.train_files=[a (1).json,b.json]", 'data.train_files=["a (1).json","b.json"]'),
        ("exp_manager.explicit_log_dir=runs/a (1)", 'exp_manager.explicit_log_dir="runs/a (1)"'),
        ("exp_manager.explicit_log_dir=2024", 'exp_manager.explicit_log_dir="2024"'),
    ],
)
def test_quoting_as_the_message_advises_works(override, quoted):
    """For a list the quotes go around each item, not around the whole list."""
    with pytest.raises(UserError, match="quotes") as raised:
        compose("quickstart", [override])
    advice = {"[": """key=["a, b","c"]""", "2": """='"2024"'""", "r": """='"runs/a (1)"'"""}[
        override.partition("=")[2][0]
    ]
    assert advice in str(raised.value)
    key, _, value = quoted.partition("=")
    section, name = key.split(".")
    config = getattr(getattr(compose("quickstart", [quoted]), section), name)
    assert config == (["a (1).json", "b.json"] if "[" in value else value.strip('"'))


MISTAKES = [
    ("trainer.max_step=3", "unknown key trainer.max_step; did you mean trainer.max_steps?"),
    ("max_steps=3", "unknown key max_steps; did you mean trainer.max_steps?"),
    ("+trainer.foo=1", "unknown key trainer.foo"),
    ("hydra.run.dir=x", "unknown key hydra.run.dir; known: seed, trainer, exp_manager"),
    ("trainer.max_steps=abc", 'trainer.max_steps: expected an integer of at least 1, got "abc"'),
    ("trainer.max_steps=1.5", "trainer.max_steps: expected an integer of at least 1, got 1.5"),
    ("trainer.max_steps=true", "trainer.max_steps: expected an integer of at least 1, got true"),
    ("trainer.max_steps=0", "trainer.max_steps: expected an integer of at least 1, got 0"),
    ("trainer.max_steps=null", "trainer.max_steps: expected an integer of at least 1, got null"),
    ("trainer.precision=fp8", 'trainer.precision: expected one of 32, bf16, 64, got "fp8"'),
    ("model.sequence_parallel=1", "model.sequence_parallel: expected true or false, got 1"),
    ("model.optim.lr=nan", "model.optim.lr: expected a number of at least 0, got NaN"),
    ("generation.top_p=0", "generation.top_p: expected a number above 0 and at most 1, got 0"),
    ("algorithm.threshold=x", 'algorithm.threshold: expected a number, got "x"'),
    ("algorithm.off_policy=x", 'algorithm.off_policy: expected a mapping, such as {name: 1}, got "x"'),
    ("model.optim.betas=[0.9]", "model.optim.betas"),
    ("model.optim.betas=[0.9,b]", 'model.optim.betas.1: expected a list of 2 numbers, got "b"'),
    ("data.train_files=a.json", 'data.train_files: expected a list of texts, such as [a,b], got "a.json"'),
    ("model.optim=3", "model.optim: expected a section of keys, got 3"),
    ("generation=vlm", "generation has no choice vlm; did you mean vllm?"),
    ("trainer=5", "trainer has no choice 5; known: default"),
    ("trainer.max_steps=1,2", "one value is expected"),
    ("trainer.max_steps", "expected key=value"),
    ("model.path=a=b", """special characters in quotes: model.path='"a=b"'"""),
    ('data.prompt_suffix="a b', """special characters in quotes: data.prompt_suffix='"a b"'"""),
    (
        "quickstart",
        "expected key=value, such as 'data.prompt_suffix=\" two words\"'; a config is chosen by --config-name",
    ),
    ("model.optim.learning_rate=1", "; known in model.optim: name, lr, weight_decay,"),
    ("model.micro_batch_size=1", "; known in model: path, tensor_model_parallel_size,"),
    ("trainer.learning_rate=1", "; known in trainer: max_steps,"),
    ("nowhere.learning_rate=1", "; known: seed, trainer,"),
    ("algorthm.tau=1", "did you mean algorithm.tau?"),
    ("model.path=${nowhere}", "Interpolation key 'nowhere' not found"),
    ("model.path=???", "model.path must be given"),
    ("~trainer.max_steps", "trainer.max_steps is missing (expected an integer of at least 1)"),
    ("+trainer.max_steps=3", "An item is already at 'trainer.max_steps'"),
]


@pytest.mark.parametrize(("override", "line"), MISTAKES)
def test_a_mistake_in_an_override_is_one_clear_line(override, line):
    with pytest.raises(UserError) as raised:
        compose("quickstart", [override])
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)


def test_every_value_of_a_wrong_type_is_listed():
    with pytest.raises(UserError, match=r"^seed: .*; trainer\.devices: .*$"):
        compose("quickstart", ["seed=-1", "trainer.devices=x"])


def test_an_unknown_config_names_the_nearest():
    with pytest.raises(UserError, match=r"no such config in .*; did you mean quickstart\?"):
        compose("quickstar")
    with pytest.raises(UserError, match=r"did you mean recipe/disco_logl_7b\?"):
        compose("recipe/disco_logl_7")


def test_the_default_config_requires_the_keys_without_default():
    with pytest.raises(UserError, match=r"model.path must be given: add model.path=\.\.\."):
        compose()
    assert compose(overrides=["model.path=m", "data.train_files=[q.json]"]).model.path == "m"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_config_path_comes_before_conf_in_the_working_directory_and_the_packaged_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yaml = "defaults: [config, _self_]\nmodel: {path: m}\ndata: {train_files: [q.json]}\nseed: %d\n"
    write(tmp_path / "conf" / "mine.yaml", yaml % 11)
    write(tmp_path / "conf" / "algorithm" / "own.yaml", "defaults: [base, _self_]\nname: gpg\n")
    write(tmp_path / "elsewhere" / "mine.yaml", yaml % 12)
    assert compose("mine").seed == 11
    assert compose("mine", config_path="elsewhere").seed == 12
    assert compose("mine.yaml", ["algorithm=own"]).algorithm.name == "gpg"
    # A config that is not in ./conf is the packaged one, and a group's choice may still be from ./conf.
    assert compose("quickstart", ["algorithm=own"]).algorithm.name == "gpg"


def test_a_conf_of_another_project_does_not_get_in_the_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "conf" / "config.yaml", "something: else\n")
    assert compose("quickstart").algorithm.name == "disco"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: [1\nmodel: 2\n", r"bad\.yaml line 2: not valid YAML: expected ',' or '\]'"),
        ("seed: 1\nseed: 2\n", r"bad\.yaml line 2: not valid YAML: found duplicate key seed"),
        (
            "defaults: [config, _self_]\ntrainer: {max_stepz: 3}\n",
            r"trainer.max_stepz; did you mean trainer.max_steps\?",
        ),
        ("defaults: [config, {override algorithm: disko}]\n", r"there is no algorithm/disko .*did you mean disco\?"),
        ("defaults: [nowhere]\n", "there is no nowhere to compose"),
        ("- a\n- b\n", r"config bad: .*must be a DictConfig"),
        ("just text\n", "unknown key just text"),
        ("seed: 1\n", "trainer is missing .*; and 7 more$"),
        ("seed: !!python/object/apply:os.system ['touch planted']\n", "could not determine a constructor"),
        ("seed: !!python/name:os.system\n", "could not determine a constructor"),
    ],
)
def test_a_mistake_in_a_file_is_one_clear_line(tmp_path, monkeypatch, text, line):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "conf" / "bad.yaml", text)
    with pytest.raises(UserError, match=line) as raised:
        compose("bad")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "planted").exists()


def test_an_unknown_key_in_a_file_names_the_nearest(tmp_path):
    write(tmp_path / "mine.yaml", "defaults: [quickstart, _self_]\nmodel:\n  tensor_parallel_size: 2\n")
    with pytest.raises(UserError, match=r"tensor_parallel_size.*did you mean model.tensor_model_parallel_size\?"):
        compose("mine", config_path=str(tmp_path))


def test_config_path_must_be_a_directory(tmp_path):
    with pytest.raises(UserError, match="there is no such directory"):
        compose("quickstart", config_path=str(tmp_path / "nowhere"))


def test_a_config_that_was_written_is_read_back_equal(tmp_path):
    config = compose(
        "recipe/disco_lratio_llama_8b", ["algorithm.lambda=inf", "model.optim.lr=1e-7", "data.shuffle=false"]
    )
    file = write(tmp_path / "config.yaml", to_yaml(config))
    assert load_run_config(file) == config


@pytest.mark.parametrize("text", ["- 1\n", "seed: 1\n", "seed: [", None, "\0"])
def test_a_damaged_config_of_a_run_is_one_clear_line(tmp_path, text):
    file = tmp_path / "config.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml|is missing") as raised:
        load_run_config(file)
    assert "\n" not in str(raised.value)


def test_overridden_keys():
    keys = overridden_keys(["trainer.devices=2", "+seed=1", "algorithm=grpo"])
    assert keys == {"trainer.devices", "seed", "algorithm"}


def test_assets_are_the_packaged_ones_in_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compose("quickstart").model.path == str(paths.packaged_directory("assets") / "quickstart" / "model")


@pytest.mark.parametrize("override", ["algorithm.parameters.scale=2", "algorithm.parameters={scale: 2}"])
def test_parameters_of_a_users_objective_have_any_name(override, tmp_path):
    config = compose("quickstart", [override])
    assert config.algorithm.objective()["scale"] == 2
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_run_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("override", ["generation.options.block_size=16", "generation.options={block_size: 16}"])
def test_generation_options_have_any_name(override):
    assert compose("quickstart", ["generation=vllm", override]).generation.options == {"block_size": 16}
