"""Convert a megatron-core checkpoint (torch_dist) to a Hugging Face directory. Runs in one process, without a GPU, and
holds about two tensors in memory.

    python -m nemo_disco.convert.megatron_to_hf runs/quickstart/checkpoints/step_60 exported/

Tokenizer, chat template and generation config are copied from the model that the run started from.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nemo_disco.conversion.command import run


def main(arguments: Sequence[str] | None = None) -> int:
    return run("megatron_to_hf", __doc__, "RUN/checkpoints/step_N", arguments, model=True)


if __name__ == "__main__":
    sys.exit(main())
