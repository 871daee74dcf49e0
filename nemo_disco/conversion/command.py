"""The command line of a converter: two directories, and sometimes the model whose config is carried over."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.logs import setup_logging


def run(
    name: str,
    words: str | None,
    source: str,
    arguments: Sequence[str] | None,
    *,
    model: bool = False,
) -> int:
    """Parse, run conversion.convert's function of that name, and say where the result is.

    The exit code: 0, or 2 for bad input (one line on stderr).
    """
    about = (words or "").split("\n\n", 1)[0]
    parser = argparse.ArgumentParser(prog=name, description=about)
    parser.add_argument("source", type=Path, help=source)
    parser.add_argument("out", type=Path, help="the directory to write")
    if model:
        parser.add_argument("--model", type=Path, help="the Hugging Face directory whose config and tokenizer it gets")
    options = vars(parser.parse_args(arguments))
    setup_logging()  # before megatron-core is imported, which warns
    from nemo_disco.conversion import convert

    try:
        print(getattr(convert, name)(options.pop("source"), options.pop("out"), **options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
