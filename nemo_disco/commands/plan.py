"""`nemo-disco plan`: check a configuration and print what the run would do and need."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nemo_disco.estimate.memory import Workload

if TYPE_CHECKING:
    from nemo_disco.config.schema import RunConfig


def main(options: argparse.Namespace) -> int:
    """Print the plan of the composed configuration. Raises UserError as the run itself would."""
    from nemo_disco.config.compose import compose
    from nemo_disco.config.consistency import check_consistency
    from nemo_disco.estimate.plan import print_plan

    config = compose(options.config_name, options.overrides, options.config_path)
    world_size = config.trainer.devices * config.trainer.num_nodes
    check_consistency(config, world_size)
    print_plan(config, world_size, find_workload(config), _constraint_advice(config))
    return 0


def _constraint_advice(config: RunConfig) -> str | None:
    """A line on the estimator and delta of the constraint, if the objective has a threshold. Raises UserError if the
    estimator compares more tokens than the model has."""
    from nemo_disco.commands.checks import check_likely_tokens, check_objective
    from nemo_disco.estimate.trust_region import advise
    from nemo_disco.models.shape import find_shape

    constraint = check_objective(config).constraint
    shape, _ = find_shape(config.model.path)
    if shape is not None:
        check_likely_tokens(constraint, shape.vocab)
    if constraint.limit is None:
        return None
    responses = config.algorithm.mini_batch_questions * config.generation.responses_per_question
    return advise(constraint.estimator, constraint.limit, responses * config.generation.longest_response)


def find_workload(config: RunConfig) -> Workload:
    """The work of one step of a run. Raises UserError for a faulty objective."""
    from nemo_disco.commands.checks import check_objective

    objective = check_objective(config)
    return Workload(
        questions=config.data.questions_per_step,
        mini_batch_questions=config.algorithm.mini_batch_questions,
        group=config.generation.responses_per_question,
        prompt_limit=config.data.max_prompt_length,
        response_limit=config.generation.longest_response,
        token_budget=config.model.token_budget,
        precision=config.trainer.precision,
        moments_dtype=config.model.optim.moments_dtype,
        offload=config.model.optim.offload,
        engine=config.generation.engine,
        two_passes=not objective.separable,
        reference="reference_log_probs" in objective.needs,
        likely_tokens=objective.constraint.likely_tokens,
    )
