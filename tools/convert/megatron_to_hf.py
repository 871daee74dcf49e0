"""A checkpoint of a run (megatron-core's torch_dist format) -> a Hugging Face directory. One process, no GPU.

    python -m nemo_disco.convert.megatron_to_hf runs/quickstart/checkpoints/step_20 exported/

Tokenizer, chat template and generation config come from the directory that the run's model came from.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.logs import setup_logging


def convert(checkpoint: Path, out: Path, model: str | None = None) -> Path:
    """Write `out`; returns it. model: the Hugging Face directory that the run began with (default: the run's
    config.yaml says).

    Raises UserError for a damaged checkpoint, one of another model, or an `out` that exists.
    """
    from nemo_disco.config.compose import load_run_config
    from nemo_disco.policy import checkpoint as checkpoints
    from nemo_disco.policy import parallel
    from nemo_disco.policy.policy import Policy

    if out.exists():
        raise UserError(f"{out} exists already: name a directory that does not")
    config = load_run_config(checkpoint.parent.parent / "config.yaml").model
    whole = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "context_parallel_size": 1,
        "sequence_parallel": False,
    }
    config = config.model_copy(update={**whole, **({"path": model} if model else {})})
    parallel.start(config)
    policy = Policy(config, trainable=False)
    checkpoints.load(policy, checkpoint)
    policy.export(out)
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="megatron_to_hf", description=__doc__.split("\n", 1)[0])
    parser.add_argument("checkpoint", type=Path, help="RUN/checkpoints/step_N")
    parser.add_argument("out", type=Path, help="the Hugging Face directory to write")
    parser.add_argument("--model", help="the Hugging Face directory that the run began with")
    options = parser.parse_args(arguments)
    setup_logging()
    try:
        print(convert(options.checkpoint, options.out, options.model))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
