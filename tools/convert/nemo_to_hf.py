"""Convert a NeMo 2.0 directory (weights/ in torch_dist, context/) to a Hugging Face directory. Runs in one process,
without a GPU, and holds about two tensors in memory.

    python -m nemo_disco.convert.nemo_to_hf nemo/ exported/ --model models/DeepSeek-R1-Distill-Qwen-1.5B

--model names the Hugging Face directory whose config and tokenizer are copied. A NeMo directory that hf_to_nemo wrote
has them in context/ and does not need it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nemo_disco.conversion.command import run


def main(arguments: Sequence[str] | None = None) -> int:
    return run("nemo_to_hf", __doc__, "a NeMo 2.0 directory", arguments, model=True)


if __name__ == "__main__":
    sys.exit(main())
