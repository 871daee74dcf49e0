"""Convert a Hugging Face directory to a megatron-core checkpoint (torch_dist), which loads at any layout. Runs in one
process, without a GPU, and holds about two tensors in memory.

    python -m nemo_disco.convert.hf_to_megatron models/DeepSeek-R1-Distill-Qwen-1.5B megatron/

The result has copies of the config, tokenizer, chat template and generation config, so that it can be evaluated and
converted back.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nemo_disco.conversion.command import run


def main(arguments: Sequence[str] | None = None) -> int:
    return run("hf_to_megatron", __doc__, "a Hugging Face directory", arguments)


if __name__ == "__main__":
    sys.exit(main())
