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
    print_plan(config, world_size, find_workload(config))
    return 0


def find_workload(config: RunConfig) -> Workload:
    """The work of one step of a run. Raises UserError for a faulty objective."""
    from nemo_disco.commands.checks import check_objective

    objective = check_objective(config)
    constraint = objective.constraint
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
        engine_routes=config.model.moe_router_replay == "engine",
        likely_tokens=constraint.likely_tokens,
        estimator=constraint.estimator,
        delta=constraint.limit,
    )
