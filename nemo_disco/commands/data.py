"""`nemo-disco data`: describe question files, and write what is left after filtering."""

from __future__ import annotations

import argparse
from functools import partial

from nemo_disco.runtime.errors import UserError


def main(options: argparse.Namespace) -> int:
    """Print a survey of the files; with --out, filter and write the questions. Raises UserError for bad input."""
    from nemo_disco.data.survey import describe, filter_questions, survey_questions, write_questions
    from nemo_disco.rewards import MathGrader

    if options.out is None and (options.drop or options.max_tokens):
        raise UserError("--drop and --max-tokens choose the questions to write: name the file with --out")
    if "contaminated" in options.drop and not options.against:
        raise UserError("--drop contaminated compares with evaluation files: name them with --against")
    count_tokens = None
    if options.model is not None:
        from nemo_disco.data.chat import prompt_lengths
        from nemo_disco.data.tokenizer import load_tokenizer

        count_tokens = partial(prompt_lengths, load_tokenizer(options.model))
    elif options.max_tokens is not None:
        raise UserError("--max-tokens counts a tokenizer's tokens: name its directory with --model")
    with MathGrader() as grader:
        survey = survey_questions(
            options.files,
            against=options.against,
            rollouts=options.rollouts,
            count_tokens=count_tokens,
            find_unparsable=grader.find_unparsable,
        )
    print(describe(survey))
    if options.out is not None:
        questions, notes = filter_questions(survey, options.drop, options.max_tokens)
        write_questions(options.out, questions)
        print("\n".join([*notes, f"{options.out}: {len(questions):,} questions"]))
    return 0
