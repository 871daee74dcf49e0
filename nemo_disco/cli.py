"""The commands; thin. Parses arguments, turns errors into one line and an exit code, and starts the ranks.

Must import nothing heavy at the top: `nemo-disco --help` shows at once. What a command does is in the rooms.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from nemo_disco import __version__
from nemo_disco.runtime import launch, srun, streams, user_code
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.files import atomic_file, refusal_of_disk, sweep_scratch

RUNS = {
    "train": "train a policy",
    "evaluate": "score a policy on question files",
    "verify": "one mini-batch: is the gradient of this layout right, and do engine and trainer agree",
}
CONFIG_HELP = """Settings are Hydra's: key=value sets a key (trainer.max_steps=10), group=choice takes another file of a
group (algorithm=grpo), --config-name recipe/NAME starts from a recipe of the papers."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0, 2 for bad input (one line on stderr), 130 for an interrupt."""
    launch.adopt()
    streams.guard()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except UserError as error:
        return _refused(error)
    except KeyboardInterrupt:
        return 130
    except streams.ReaderLeftError:
        return 0
    except Exception as error:
        if (refusal := refusal_of_disk(error)) is not None:
            return _refused(refusal)
        launch.report(error)
        raise
    finally:
        streams.tolerate()  # the interpreter writes what is left at its end


def _refused(error: UserError) -> int:
    if not launch.report(error):
        print(f"error: {error}", file=sys.stderr)
    return 2


def _dispatch(arguments: list[str]) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # Overrides may stand before, between and after options; argparse leaves the later ones over.
    stray = [word for word in rest if word.startswith("-") or "overrides" not in options]
    if stray:
        parser.error(f"unknown argument: {' '.join(stray)} ('nemo-disco {options.command} --help' lists what there is)")
    if options.command in RUNS:
        return _run(options.command, options, [*options.overrides, *rest], arguments)
    if options.command == "plan":
        return _plan(options, [*options.overrides, *rest])
    return {"grade": _grade, "doctor": _doctor, "report": _report, "data": _data}[options.command](options)


def _run(command: str, options: argparse.Namespace, overrides: list[str], arguments: list[str]) -> int:
    from nemo_disco.config.checks import check, check_files, check_objective
    from nemo_disco.config.compose import compose, overridden

    faulthandler.enable(sys.__stderr__ or 2)  # a crash in a kernel leaves its traceback too
    config = compose(options.config_name, overrides, options.config_path)
    srun.adopt(config.exp_manager.explicit_log_dir)
    asked = {"trainer", "trainer.devices", "trainer.num_nodes"} & overridden(overrides)
    world_size = launch.world_size(config.trainer.devices, config.trainer.num_nodes, overridden=bool(asked))
    check(config, world_size)
    check_files(config, command, first_rank=os.environ.get("RANK", "0") == "0")
    if os.environ.get("RANK", "0") == "0":
        sweep_scratch()
    launch.set_defaults()
    if world_size > 1 and not launch.launched():
        return launch.spawn(world_size, [sys.executable, "-m", "nemo_disco", *arguments])
    from nemo_disco.runtime.logs import setup_logging

    setup_logging(int(os.environ.get("RANK", 0)), world_size)  # megatron-core warns while it is imported
    check_objective(config)

    from nemo_disco.algorithms import run

    entry = {"train": run.train, "evaluate": run.evaluate, "verify": run.verify}[command]
    if command != "verify":  # whose result is what it prints
        streams.tolerate()
    try:
        return entry(config)
    except SystemExit as error:  # nothing of ours raises it
        raise UserError(
            f"SystemExit at {user_code.innermost(error)}: {error}; code that a run calls must raise an error or return"
        ) from error


def _plan(options: argparse.Namespace, overrides: list[str]) -> int:
    from nemo_disco.config.checks import check, check_objective
    from nemo_disco.config.compose import compose
    from nemo_disco.config.plan import print_plan

    config = compose(options.config_name, overrides, options.config_path)
    world_size = config.trainer.devices * config.trainer.num_nodes
    check(config, world_size)
    check_objective(config)
    print_plan(config, world_size)
    return 0


def _grade(options: argparse.Namespace) -> int:
    from nemo_disco.rewards.grade_file import grade_file

    settings = {"timeout": options.timeout, "workers": options.workers, "require_think": options.require_think}
    if options.out is None:
        grade_file(options.file, sys.stdout, **settings)
        return 0
    with atomic_file(options.out) as work, work.open("w", encoding="utf-8") as out:
        grade_file(options.file, out, **settings)
    return 0


def _data(options: argparse.Namespace) -> int:
    from nemo_disco.data.survey import describe, filter_questions, survey_questions, write_questions
    from nemo_disco.rewards import MathGrader

    count = None
    if options.model is not None:
        from nemo_disco.data.chat import prompt_lengths
        from nemo_disco.data.tokenizer import load_tokenizer

        count = partial(prompt_lengths, load_tokenizer(options.model))
    elif options.max_tokens is not None:
        raise UserError("--max-tokens counts a tokenizer's tokens: name its directory with --model")
    with MathGrader() as grader:
        survey = survey_questions(
            options.files,
            against=options.against,
            rollouts=options.rollouts,
            count_tokens=count,
            find_unparsable=grader.unread,
        )
    print(describe(survey))
    if options.out is not None:
        kept, notes = filter_questions(survey, options.drop, options.max_tokens)
        write_questions(options.out, kept)
        print("\n".join([*notes, f"{options.out}: {len(kept):,} questions"]))
    return 0


def _doctor(_: argparse.Namespace) -> int:
    from nemo_disco.runtime.doctor import print_doctor

    return 0 if print_doctor() else 1


def _report(options: argparse.Namespace) -> int:
    from nemo_disco.evaluation.report import write_report

    if options.plots is not None:
        from nemo_disco.evaluation.plots import write_plots

        print("\n".join(map(str, write_plots(options.runs, options.plots))))
    if options.watch:
        from nemo_disco.evaluation.watch import watch

        return watch(options.runs, options.out)
    print(write_report(options.runs, options.out))
    return 0


def _path(text: str) -> Path:
    """~ is the home directory here too: a shell leaves that of --out=~/x as it is."""
    return Path(os.path.expanduser(text))


def _count(text: str) -> int:
    with contextlib.suppress(ValueError):
        if int(text) >= 1:
            return int(text)
    raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text}")


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if float(text) > 0:  # nan is not
            return float(text)
    raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nemo-disco", description="DisCO post-training of reasoning models.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, words in {**RUNS, "plan": "the batch vocabulary and the memory of a run, without running it"}.items():
        command = commands.add_parser(name, help=words, description=f"{words}.", epilog=CONFIG_HELP)
        command.add_argument("--config-name", "-cn", default="config", metavar="NAME", help="default: config")
        command.add_argument(
            "--config-path",
            "-cp",
            type=os.path.expanduser,
            metavar="DIR",
            help="looked in before ./conf and the packaged one",
        )
        command.add_argument("overrides", nargs="*", metavar="key=value")
    grade = commands.add_parser("grade", help="reward and reason of each answer in a file")
    grade.add_argument("file", type=_path, metavar="FILE.jsonl", help="`response` and `answer` a line")
    grade.add_argument("--out", type=_path, metavar="FILE", help="write the lines there instead of to the screen")
    grade.add_argument("--timeout", type=_seconds, default=5.0, metavar="SECONDS", help="for one answer (default 5)")
    grade.add_argument("--workers", type=_count, default=2, metavar="N", help="processes (default 2)")
    grade.add_argument("--require-think", action="store_true", help="grade only what comes after </think>")
    data = commands.add_parser("data", help="what is in question files; filter and convert them")
    data.add_argument("files", type=_path, nargs="+", metavar="FILE", help=".json, .jsonl, .parquet, a saved dataset")
    data.add_argument("--model", type=_path, metavar="DIR", help="count prompt tokens with this directory's tokenizer")
    data.add_argument("--against", type=_path, nargs="+", default=[], metavar="FILE", help="evaluation files: overlap")
    data.add_argument(
        "--rollouts", type=_path, nargs="+", default=[], metavar="FILE", help="pass rates: rollouts/*.jsonl"
    )
    data.add_argument("--out", type=_path, metavar="FILE", help="write what is left as .jsonl, .json or .parquet")
    data.add_argument("--max-tokens", type=_count, metavar="N", help="with --out: leave longer prompts out")
    drop = ("duplicates", "contaminated", "unparsable")
    data.add_argument("--drop", nargs="+", default=[], choices=drop, help="with --out: leave these out as well")
    commands.add_parser("doctor", help="which kernels and engines this machine has, and what is missing for what")
    report = commands.add_parser("report", help="one HTML page about one or several runs")
    report.add_argument("runs", type=_path, nargs="+", metavar="RUN", help="a run directory")
    report.add_argument("--out", type=_path, metavar="FILE", help="default: report.html in the first run directory")
    report.add_argument("--plots", type=_path, metavar="DIR", help="also write PNG plots and metrics.csv there")
    report.add_argument("--watch", action="store_true", help="write it anew whenever a run does, until Ctrl-C")
    return parser
