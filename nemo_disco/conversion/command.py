"""Command line of the converters: two directories, and for some the model whose config and tokenizer are copied."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.logs import setup_logging


def run(name: str, docstring: str | None, source: str, arguments: Sequence[str] | None, *, model: bool = False) -> int:
    """Run the function of conversion.convert that has this name, and print the path of the result.

    docstring: that of the converter's script. source: help text of the first argument. model: there is a --model
    option. Returns the exit code: 0, or 2 for bad input (one line on stderr).
    """
    parser = argparse.ArgumentParser(prog=name, description=(docstring or "").split("\n\n", 1)[0])
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
