"""`nemo-disco plan`: check a configuration and print what the run would do and need."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nemo_disco.estimate.timing import Needs

if TYPE_CHECKING:
    from nemo_disco.algorithms import Objective


def main(options: argparse.Namespace) -> int:
    """Print the plan of the composed configuration. Raises UserError as the run itself would."""
    from nemo_disco.commands.checks import check_objective
    from nemo_disco.config.compose import compose
    from nemo_disco.config.consistency import check_consistency
    from nemo_disco.estimate.plan import print_plan

    config = compose(options.config_name, options.overrides, options.config_path)
    world_size = config.trainer.devices * config.trainer.num_nodes
    check_consistency(config, world_size)
    print_plan(config, world_size, find_needs(check_objective(config)))
    return 0


def find_needs(objective: Objective) -> Needs:
    """The passes and policies that a step of the objective takes."""
    return Needs(two_passes=not objective.separable, reference="reference_log_probs" in objective.needs)
