"""The `nemo-disco` command line: parse the arguments, run the command, turn errors into one line and an exit code.

Must import nothing heavy at the top: `nemo-disco --help` answers at once. The commands are in nemo_disco/commands/.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from nemo_disco import __version__
from nemo_disco.runtime import launch, streams
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.files import describe_disk_error

CONFIG_COMMANDS = {
    "train": "train a policy",
    "evaluate": "score a policy on question files",
    "verify": "sample one mini-batch, compare the engine's log-probs with the trainer's, and compute its gradient",
    "plan": "print batches, memory, layouts and estimated time of a run, without running it",
}
CONFIG_HELP = """Settings are Hydra's: key=value sets a key (trainer.max_steps=10), group=choice takes another file of a
group (algorithm=grpo), --config-name recipe/NAME starts from a recipe of the papers."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 for bad input and 3 for a run that diverged (one
    line on stderr), 130 for an interrupt."""
    launch.die_with_launcher()
    streams.guard()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code: int = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except UserError as error:
        return _print_error(error)
    except KeyboardInterrupt:
        return 130
    except streams.ReaderLeftError:
        return 0
    except Exception as error:
        if (refusal := describe_disk_error(error)) is not None:
            return _print_error(refusal)
        launch.report(error)
        raise
    finally:
        streams.ignore_closed_output()  # the interpreter flushes the streams when it ends


def _print_error(error: UserError) -> int:
    if not launch.report(error):
        print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def _dispatch(arguments: list[str]) -> Any:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # Overrides may stand before, between and after options; argparse leaves the later ones over.
    unknown = [word for word in rest if word.startswith("-") or "overrides" not in options]
    if unknown:
        parser.error(f"unknown argument: {' '.join(unknown)} ('nemo-disco {options.command} --help' lists arguments)")
    if "overrides" in options:
        options.overrides += rest
    if options.command in ("train", "evaluate", "verify"):
        return import_module("nemo_disco.commands.start").main(options, arguments)
    return import_module(f"nemo_disco.commands.{options.command}").main(options)


def _path(text: str) -> Path:
    """The path with ~ expanded: a shell leaves the ~ of --out=~/x as it is."""
    return Path(os.path.expanduser(text))


def _positive(text: str, number: type[int] | type[float] = int, words: str = "an integer of at least 1") -> float:
    with contextlib.suppress(ValueError):
        if number(text) > 0:  # false for nan
            return number(text)
    raise argparse.ArgumentTypeError(f"expected {words}, got {text}")


_seconds = partial(_positive, number=float, words="seconds above 0")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nemo-disco", description="DisCO post-training of reasoning models.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, words in CONFIG_COMMANDS.items():
        command = commands.add_parser(name, help=words, description=f"{words}.", epilog=CONFIG_HELP)
        command.add_argument("--config-name", "-cn", default="config", metavar="NAME", help="default: config")
        words = "read NAME and group files from here first, then from ./conf and the packaged conf/"
        command.add_argument("--config-path", "-cp", type=os.path.expanduser, metavar="DIR", help=words)
        command.add_argument("overrides", nargs="*", metavar="key=value")
    words = "print the reward of each response in a file, and the reason"
    description = "Compare each `response` with its `answer` as mathematics; print `reward` and `reason` as JSON."
    grade = commands.add_parser("grade", help=words, description=description)
    grade.add_argument("file", type=_path, metavar="FILE.jsonl", help="JSON lines with `response` and `answer`")
    grade.add_argument("--out", type=_path, metavar="FILE", help="write the lines there instead of to the screen")
    grade.add_argument("--timeout", type=_seconds, default=5.0, metavar="SECONDS", help="for one answer (default 5)")
    grade.add_argument("--workers", type=_positive, default=2, metavar="N", help="processes (default 2)")
    grade.add_argument("--require-think", action="store_true", help="grade only the text after </think>")
    words = "count duplicates and other faults in question files; write the good questions to a new file"
    description = "Count duplicate, contaminated and unparsable questions; --out writes the questions to keep."
    data = commands.add_parser("data", help=words, description=description)
    data.add_argument("files", type=_path, nargs="+", metavar="FILE", help=".json, .jsonl, .parquet, a saved dataset")
    data.add_argument("--model", type=_path, metavar="DIR", help="count prompt tokens with this directory's tokenizer")
    words = "evaluation files: a question that is also in one of them counts as contaminated"
    data.add_argument("--against", type=_path, nargs="+", default=[], metavar="FILE", help=words)
    words = "a run's rollouts/*.jsonl: print pass rates; with --out: leave out questions always or never solved"
    data.add_argument("--rollouts", type=_path, nargs="+", default=[], metavar="FILE", help=words)
    data.add_argument("--out", type=_path, metavar="FILE", help="write the questions as .jsonl, .json or .parquet")
    data.add_argument("--max-tokens", type=_positive, metavar="N", help="with --out: leave longer prompts out")
    faults = ("duplicates", "contaminated", "unparsable")
    data.add_argument("--drop", nargs="+", default=[], choices=faults, help="with --out: leave such questions out")
    words = "list this machine's packages, GPUs and programs, and the missing parts of each feature"
    description = "List the packages, GPUs and programs found here, and for each feature the parts that are missing."
    doctor = commands.add_parser("doctor", help=words, description=description)
    doctor.add_argument("--report", type=_path, nargs="*", metavar="RUN", help="Markdown for an issue, also on runs")
    words = "write one HTML page about one or several runs"
    description = "Write an HTML page with curves, evaluations and rollouts of the runs; it opens without a network."
    report = commands.add_parser("report", help=words, description=description)
    report.add_argument("runs", type=_path, nargs="+", metavar="RUN", help="a run directory")
    report.add_argument("--out", type=_path, metavar="FILE", help="default: report.html in the first run directory")
    report.add_argument("--plots", type=_path, metavar="DIR", help="also write PNG plots and metrics.csv there")
    report.add_argument("--watch", action="store_true", help="write it anew whenever a run makes a step, until Ctrl-C")
    return parser
