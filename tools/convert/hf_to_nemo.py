"""Convert a Hugging Face directory to a NeMo 2.0 directory (weights/ in torch_dist, context/). Runs in one process,
without a GPU, and holds about two tensors in memory.

    python -m nemo_disco.convert.hf_to_nemo models/DeepSeek-R1-Distill-Qwen-1.5B nemo/
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nemo_disco.conversion.command import run


def main(arguments: Sequence[str] | None = None) -> int:
    return run("hf_to_nemo", __doc__, "a Hugging Face directory", arguments)


if __name__ == "__main__":
    sys.exit(main())
