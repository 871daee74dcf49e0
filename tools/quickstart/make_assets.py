"""Make assets/quickstart: the tokenizer, the questions and the warm-started model. Seeded; minutes on one CPU thread.

Run from the repository: python -m tools.quickstart.make_assets [OUTPUT]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from . import task, warm_start
from . import tokenizer as tokenizers

SEED = 0
VOCABULARY = 512
TEST, DEVELOPMENT, TRAIN = 256, 256, 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, nargs="?", default=Path("assets/quickstart"))
    output: Path = parser.parse_args().output
    torch.set_num_threads(1)
    recipe = warm_start.Recipe()
    test, development, train, supervised = splits(recipe)
    tokenizer = make_tokenizer(train)
    tokenizer.save_pretrained(output / "model")  # before training, whose padding setting would be saved with it
    model = warm_start.new_model(tokenizer, SEED)
    warm_start.train(model, tokenizer, supervised, development, recipe)
    for temperature in (1.0, 0.6):
        print(f"test, temperature {temperature}: {warm_start.accuracy(model, tokenizer, test, temperature)}")
    model.save_pretrained(output / "model")
    (output / "model" / "model.safetensors").chmod(0o644)
    write(output / "test.jsonl", test)
    write(output / "train.jsonl", train)


def splits(recipe: warm_start.Recipe) -> tuple[list[task.Problem], ...]:
    """Problems of test, development, train and supervised, all different; the last two use no held-out numbers."""
    problems = task.stream(SEED)
    test, development = task.hold_out(problems, TEST), task.hold_out(problems, DEVELOPMENT)
    problems = task.exclude(problems, [*test, *development])
    train, supervised = task.take(problems, TRAIN), task.take(problems, recipe.batch * recipe.max_steps)
    task.check_held_out([*test, *development], [*train, *supervised])
    return test, development, train, supervised


def make_tokenizer(problems: Sequence[task.Problem]) -> PreTrainedTokenizerFast:
    """The tokenizer, trained on the problems; roles and common words are repeated so that they become single tokens."""
    common = [tokenizers.COMMON_WORDS] * 30 + ["user\nassistant\nsystem\n" + tokenizers.SUFFIX] * 300
    return tokenizers.train([*common, *(t for p in problems for t in (p.question, p.solution))], VOCABULARY)


def write(path: Path, problems: Sequence[task.Problem]) -> None:
    path.write_text("".join(json.dumps(p.row()) + "\n" for p in problems))


if __name__ == "__main__":
    main()
