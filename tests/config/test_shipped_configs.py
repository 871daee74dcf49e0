"""Every configuration in conf/ composes, is consistent and names an existing objective; recipes follow their papers."""

import re

import pytest

from nemo_disco.commands.checks import check_objective
from nemo_disco.config import paths
from nemo_disco.config.compose import compose
from nemo_disco.config.consistency import check_consistency

CONF = paths.packaged_directory("conf")
RUNS = [name for name in paths.config_names(CONF) if name != "config"]
# Values for the keys that have no default.
REQUIRED = ["model.path=m", "data.train_files=[q.json]"]
CHOICES = [(group, choice) for group in ("algorithm", "data", "evaluation", "model", "reward", "generation")
           for choice in paths.group_choices([CONF], group) if choice != "base"]  # fmt: skip
# Choices that are an objective with settings of its constraint: choice -> the objective.
PRESETS = {"authors": "disco", "disco_small": "disco", "grpo_constrained": "grpo"}
# The recipes that choose a preset: (recipe, preset).
PRESET_RECIPES = [
    (path.stem, preset)
    for path in sorted((CONF / "recipe").glob("*.yaml"))
    for preset in re.findall(r"override /algorithm: (\w+)", path.read_text())
    if preset in PRESETS
]
# The authors' tau, by score.
TAU = {"log_likelihood": 10.0, "likelihood_ratio": 1.0}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_composes_and_is_consistent(name):
    config = compose(name, [] if name != "recipe/authors" else REQUIRED)
    check_consistency(config, config.trainer.devices * config.trainer.num_nodes)
    check_objective(config)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_a_group_choice_composes(group, choice):
    config = compose(overrides=[f"{group}={choice}", *REQUIRED])
    check_objective(config)
    if group == "algorithm":
        assert config.algorithm.name == PRESETS.get(choice, choice)
        # The quickstart's settings for DisCO do not break the other objectives.
        check_objective(compose("quickstart", [f"algorithm={choice}"]))


@pytest.mark.parametrize(
    ("choice", "estimator", "delta"),
    [
        ("authors", "k1", 1e-4),
        ("disco_small", "k3", 1e-3),
        ("grpo_constrained", "k3", 1e-3),
    ],
)
def test_a_preset_has_its_constraint(choice, estimator, delta):
    constraint = check_objective(compose(overrides=[f"algorithm={choice}", *REQUIRED])).constraint
    assert (constraint.kind, constraint.strength, constraint.convention) == ("squared_hinge", 1e3, "paper")
    assert (constraint.estimator, constraint.delta) == (estimator, delta)


@pytest.mark.parametrize(("recipe", "preset"), PRESET_RECIPES)
def test_a_recipe_has_the_constraint_of_the_preset_that_it_names(recipe, preset):
    """A value that a recipe inherits would win over the preset's, silently."""
    constraint = check_objective(compose(overrides=[f"algorithm={preset}", *REQUIRED])).constraint
    assert check_objective(compose(f"recipe/{recipe}")).constraint == constraint


@pytest.mark.parametrize("size", ["1.5b", "7b", "llama_8b"])
@pytest.mark.parametrize("score", ["log_likelihood", "likelihood_ratio"])
@pytest.mark.parametrize("name", ["disco", "disco_b"])
def test_the_recipes_have_the_papers_hyperparameters(name, score, size):
    abbreviation = {"log_likelihood": "logl", "likelihood_ratio": "lratio"}[score]
    config = compose(f"recipe/{name}_{abbreviation}_{size}")
    objective, optim = check_objective(config), config.model.optim
    constraint = objective.constraint
    assert (objective.name, objective.score) == (name, score)
    assert getattr(objective, "tau", None) == (TAU[score] if name == "disco" else None)
    assert (constraint.kind, constraint.strength, constraint.delta) == ("squared_hinge", 1e3, 1e-4)
    assert (constraint.convention, constraint.estimator) == ("paper", "k1")
    assert (optim.name, optim.lr, optim.weight_decay) == ("adam", 2e-6 if size == "1.5b" else 1e-6, 0.0)
    assert config.trainer.gradient_clip_val == 1.0
    assert config.trainer.max_steps == (1400 if size == "1.5b" else 1000)
    assert (config.data.questions_per_step, config.algorithm.mini_batch_questions) == (128, 32)
    assert (config.data.max_prompt_length, config.generation.max_response_length) == (1024, 8192)
    sampling = config.generation
    assert (sampling.responses_per_question, sampling.temperature, sampling.top_p) == (8, 0.6, 1.0)
    evaluation = config.evaluation
    assert (evaluation.samples, evaluation.temperature, evaluation.top_p, len(evaluation.files)) == (16, 0.6, 0.95, 6)
    assert config.data.prompt_suffix.strip() == (
        r"Let's think step by step and output the final answer within \boxed{}."
    )
    assert config.reward.require_think
