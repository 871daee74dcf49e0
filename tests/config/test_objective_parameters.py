"""A new objective with a new parameter takes one Python file and one YAML file, and nothing else is edited."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from in_process import run_in_process
from user_module import write_user_module

from nemo_disco.algorithms.objectives import OBJECTIVES, Objective
from nemo_disco.algorithms.objectives.parameters import key_of
from nemo_disco.commands.checks import check_objective
from nemo_disco.config import paths
from nemo_disco.config.compose import changes, compose, load_run_config, to_yaml
from nemo_disco.config.safe_yaml import read_yaml
from nemo_disco.runtime.errors import UserError

OBJECTIVE = """
from dataclasses import dataclass

from nemo_disco.algorithms import Objective
from nemo_disco.algorithms.objectives import parameter


@dataclass(frozen=True, kw_only=True)
class Scaled(Objective):
    scale: float = parameter(1.0, above=0, below=10)
    flavour: str = parameter("plain", choices=("plain", "sweet"))
    every: bool = parameter(False, choices=(True, False))
    weights: tuple = (1, 2)

    def value(self, batch):
        return self.scale * (batch.token_mean(batch.log_probs) * batch.rewards).mean()
"""
YAML = "defaults: [base, _self_]\nname: scaled_by_a_user:Scaled\nscale: 2.0\nflavour: null\n"


@pytest.fixture
def config_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A directory for --config-path with algorithm/scaled.yaml; the objective's module is in the working directory."""
    write_user_module(tmp_path / "scaled_by_a_user.py", OBJECTIVE, monkeypatch)
    (tmp_path / "mine" / "algorithm").mkdir(parents=True)
    (tmp_path / "mine" / "algorithm" / "scaled.yaml").write_text(YAML)
    return str(tmp_path / "mine")


@pytest.mark.parametrize(
    ("overrides", "scale"),
    [
        ([], 2.0),
        (["algorithm.scale=3"], 3),
        (["algorithm.scale=null"], 1.0),
        (["algorithm.parameters.scale=3"], 3),
        (["algorithm.parameters={scale: 3}"], 3),
        (["++algorithm.scale=3", "algorithm.flavour=sweet", "algorithm.every=true"], 3),
        (["algorithm.weights=[3,4]", "algorithm.constraint.kind=kl_regularization"], 2.0),
    ],
)
def test_a_new_parameter_is_set_from_the_command_line(config_path, overrides, scale):
    config = compose("quickstart", ["algorithm=scaled", *overrides], config_path)
    objective = check_objective(config)
    assert (objective.name, objective.scale) == ("Scaled", scale)
    Path("config.yaml").write_text(to_yaml(config))
    assert load_run_config("config.yaml") == config
    command = ["plan", "--config-path", config_path, "--config-name=quickstart", "algorithm=scaled"]
    assert run_in_process([*command, *overrides]) == ""


@pytest.mark.usefixtures("config_path")
def test_a_parameter_needs_no_yaml():
    overrides = ["algorithm=base", "algorithm.name=scaled_by_a_user:Scaled", "algorithm.scale=3"]
    assert check_objective(compose("quickstart", overrides)).scale == 3


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("algorithm.scale=0", "objective Scaled: scale must be above 0; it is 0"),
        ("algorithm.scale=10", "objective Scaled: scale must be below 10; it is 10"),
        ("algorithm.scale=abc", "objective Scaled: scale must be a number; it is 'abc'"),
        ("algorithm.scale=true", "objective Scaled: scale must be a number; it is True"),
        ("algorithm.scale=nan", "objective Scaled: scale must be finite; it is nan"),
        ("algorithm.scale=1" + "0" * 400, "objective Scaled: scale must be finite; it is 1000"),
        ("algorithm.scale=[1]", "objective Scaled: scale must be a number; it is [1]"),
        ("algorithm.flavour=sour", "objective Scaled: flavour must be one of: "),
        ("algorithm.every=1", "objective Scaled: every must be one of: "),
        ("algorithm.scal=3", "objective Scaled does not take 'scal'; it takes: scale, "),
        ("algorithm.scal=null", "objective Scaled does not take 'scal'; it takes: scale, "),
        ("+algorithm.scal=3", "objective Scaled does not take 'scal'; it takes: scale, "),
        ("algorithm.parameters.scal=3", "objective Scaled does not take 'scal'; it takes: scale, "),
        ("algorithm.tau=3", "objective Scaled does not take 'tau'; it takes: "),
        ("algorithm.mini_batch_question=3", "unknown key algorithm.mini_batch_question; did you mean "
         "algorithm.mini_batch_questions?"),
        ("algorithm.scale=???", "algorithm.scale must be given"),
        ("~algorithm.scales", "Could not delete from config"),
        ("algorithm.constraint=hinge", "algorithm.constraint: expected a mapping"),
        ("algorithm.constraint.detla=1", "constraint does not take 'detla'; it takes: delta, "),
        ("algorithm.constraint.detla=null", "constraint does not take 'detla'; it takes: delta, "),
        ("algorithm.off_policy.cup=1", "off_policy does not take 'cup'; it takes: cap, "),
        ("tau=3", "unknown key tau; did you mean algorithm.tau?"),
    ],
)  # fmt: skip
def test_bounds_types_and_misspelt_keys_are_refused_in_one_line(config_path, override, line):
    command = ["plan", "--config-path", config_path, "--config-name=quickstart", "algorithm=scaled"]
    assert line in run_in_process([*command, override])


def test_a_mistake_in_a_yaml_file_is_refused_too(config_path):
    file = Path(config_path) / "algorithm" / "scaled.yaml"
    file.write_text(YAML.replace("flavour", "flavor"))
    with pytest.raises(UserError, match="does not take 'flavor'; it takes: flavour, "):
        check_objective(compose("quickstart", ["algorithm=scaled"], config_path))


def test_the_config_of_an_older_run_loads(tmp_path):
    """An older config.yaml has a null for each parameter of other objectives, which is no change of a setting."""
    config = compose("quickstart")
    lines = to_yaml(config).splitlines()
    others = ("lambda", "clip_low", "kl_coefficient", "question_weight", "preference", "alpha", "length_weight")
    unset = [f"  {key}: null" for key in others if f"  {key}: null" not in lines]
    start = lines.index("algorithm:") + 1
    (tmp_path / "config.yaml").write_text("\n".join([*lines[:start], *unset, *lines[start:]]))
    older = load_run_config(tmp_path / "config.yaml")
    assert changes(older, config) == []
    assert check_objective(older) == check_objective(config)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_shipped_yaml_lists_the_parameters_that_its_objective_declares(name):
    settings = read_yaml(paths.packaged_directory("conf") / "algorithm" / f"{name}.yaml")
    shared = {key_of(f) for f in fields(Objective)} | {"name", "defaults"}
    declared = {key_of(f): f.default for f in fields(OBJECTIVES[name]) if key_of(f) not in shared}
    assert set(settings) - shared == set(declared)
    for key, default in declared.items():
        assert settings[key] in (None, default)
