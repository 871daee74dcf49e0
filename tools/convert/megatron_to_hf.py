"""A megatron-core checkpoint (torch_dist) -> a Hugging Face directory. One process, no GPU, memory for one tensor.

    python -m nemo_disco.convert.megatron_to_hf runs/quickstart/checkpoints/step_60 exported/

Tokenizer, chat template and generation config come from the directory that the run's model came from.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nemo_disco.conversion.command import run


def main(arguments: Sequence[str] | None = None) -> int:
    return run("megatron_to_hf", __doc__, "RUN/checkpoints/step_N", arguments, model=True)


if __name__ == "__main__":
    sys.exit(main())
