"""Make assets/quickstart: the tokenizer, the questions and the warm-started model. Seeded, CPU, one thread, minutes.

Run from the repository: python -m tools.quickstart.make_assets [OUTPUT]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from . import tokenizer as tokenizers
from . import warm_start
from .task import Problem, stream

SEED = 0
VOCABULARY = 512
TEST, DEVELOPMENT, TRAIN = 256, 128, 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, nargs="?", default=Path("assets/quickstart"))
    output: Path = parser.parse_args().output
    torch.set_num_threads(1)
    # One stream of problems that never repeats, cut into splits: disjoint by construction, and checked below.
    problems = stream(SEED)
    test, development, train = (list(islice(problems, n)) for n in (TEST, DEVELOPMENT, TRAIN))
    tokenizer = make_tokenizer(train)
    supervised = recorded(problems, seen := [])
    model = warm_start.new_model(tokenizer, SEED)
    recipe = warm_start.Recipe()
    warm_start.train(model, tokenizer, supervised, development, recipe)
    check_disjoint(test, development, train, seen)
    for temperature in (1.0, 0.6):
        print(f"test, temperature {temperature}: {warm_start.accuracy(model, tokenizer, test, temperature)}")
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    write(output / "test.jsonl", test)
    write(output / "train.jsonl", train)


def make_tokenizer(problems: Sequence[Problem]) -> PreTrainedTokenizerFast:
    """Roles and common words are repeated so that they become single tokens beside thousands of questions."""
    common = [tokenizers.COMMON_WORDS] * 30 + ["user\nassistant\nsystem\n" + tokenizers.SUFFIX] * 300
    return tokenizers.train([*common, *(t for p in problems for t in (p.question, p.solution))], VOCABULARY)


def recorded(problems: Iterator[Problem], seen: list[Problem]) -> Iterator[Problem]:
    """The same problems, each noted in `seen` as it is used."""
    for problem in problems:
        seen.append(problem)
        yield problem


def check_disjoint(*splits: Sequence[Problem]) -> None:
    """Raises ValueError if a calculation is in two splits or twice in one."""
    keys = [p.key for split in splits for p in split]
    if len(set(keys)) != len(keys):
        raise ValueError(f"{len(keys) - len(set(keys))} problems are not held out: they appear twice")


def write(path: Path, problems: Sequence[Problem]) -> None:
    path.write_text("".join(json.dumps(p.row()) + "\n" for p in problems))


if __name__ == "__main__":
    main()
