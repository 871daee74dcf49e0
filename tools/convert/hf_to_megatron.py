"""A Hugging Face directory -> a megatron-core checkpoint (torch_dist), for any layout. One process, no GPU, memory for
one tensor.

    python -m nemo_disco.convert.hf_to_megatron models/DeepSeek-R1-Distill-Qwen-1.5B megatron/

Config, tokenizer, chat template and generation config are carried along, so that it can be evaluated and turned back.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nemo_disco.conversion.command import run


def main(arguments: Sequence[str] | None = None) -> int:
    return run("hf_to_megatron", __doc__, "a Hugging Face directory", arguments)


if __name__ == "__main__":
    sys.exit(main())
