"""Start train, evaluate or verify: compose and check the configuration, start the ranks, run the command on each."""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys

from nemo_disco.runtime import launch, srun, streams, user_code
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.files import sweep_scratch


def main(options: argparse.Namespace, arguments: list[str]) -> int:
    """Run options.command on this rank, or start the ranks with `arguments` and wait for them. Returns the exit code.

    Raises UserError for a configuration, a file or a machine that the command cannot use.
    """
    from nemo_disco.commands.checks import check_files, check_objective
    from nemo_disco.config.compose import compose, overridden_keys
    from nemo_disco.config.consistency import check_consistency

    faulthandler.enable(sys.__stderr__ or 2)  # a crash in a kernel leaves its traceback too
    command, first_rank = options.command, os.environ.get("RANK", "0") == "0"
    config = compose(options.config_name, options.overrides, options.config_path)
    srun.set_rank_variables(config.exp_manager.explicit_log_dir)
    sizes = {"trainer", "trainer.devices", "trainer.num_nodes"} & overridden_keys(options.overrides)
    world_size = launch.world_size(config.trainer.devices, config.trainer.num_nodes, set_by_user=bool(sizes))
    check_consistency(config, world_size)
    check_files(config, command, first_rank=first_rank)
    if first_rank:
        sweep_scratch()
    launch.set_torch_defaults()
    if world_size > 1 and not launch.is_rank():
        return launch.spawn(world_size, [sys.executable, "-m", "nemo_disco", *arguments])
    from nemo_disco.runtime.logs import setup_logging

    setup_logging(int(os.environ.get("RANK", 0)), world_size)  # megatron-core warns while it is imported
    check_objective(config)

    from nemo_disco.commands import evaluate, train, verify

    if command != "verify":  # its result is what it prints, so a closed stdout ends it
        streams.ignore_closed_output()
    try:
        code: int = {"train": train.main, "evaluate": evaluate.main, "verify": verify.main}[command](config)
        return code
    except SystemExit as error:  # no code of this package raises it
        raise UserError(
            f"{user_code.format_error([], error)}; code that a run calls must raise an error or return"
        ) from error
