"""`nemo-disco plan`: check a configuration and print what the run would do and need."""

from __future__ import annotations

import argparse


def main(options: argparse.Namespace) -> int:
    """Print the plan of the composed configuration. Raises UserError as the run itself would."""
    from nemo_disco.commands.checks import check_objective
    from nemo_disco.config.checks import check
    from nemo_disco.config.compose import compose
    from nemo_disco.estimate.plan import print_plan
    from nemo_disco.estimate.timing import Needs

    config = compose(options.config_name, options.overrides, options.config_path)
    world_size = config.trainer.devices * config.trainer.num_nodes
    check(config, world_size)
    objective = check_objective(config)
    separable = bool(getattr(objective, "separable", False))
    print_plan(config, world_size, Needs(not separable, "reference_log_probs" in objective.needs))
    return 0
