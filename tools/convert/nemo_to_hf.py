"""A NeMo 2.0 directory (weights/ in torch_dist, context/) -> a Hugging Face directory. One process, no GPU, memory for
one tensor.

    python -m nemo_disco.convert.nemo_to_hf nemo/ exported/ --model models/DeepSeek-R1-Distill-Qwen-1.5B

--model: whose config and tokenizer are carried over; one that hf_to_nemo wrote has them in context/.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nemo_disco.conversion.command import run


def main(arguments: Sequence[str] | None = None) -> int:
    return run("nemo_to_hf", __doc__, "a NeMo 2.0 directory", arguments, model=True)


if __name__ == "__main__":
    sys.exit(main())
