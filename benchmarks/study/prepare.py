"""The inputs of a grid's runs: a tokenizer, three question files without common questions, and warm-started policies.

They are made in the study's work directory, from fixed seeds in one thread; a policy takes about a minute. They are not
in the repository. Several processes may ask for them: the first one makes them, the others wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from tools.quickstart import tokenizer as tokenizers
from tools.quickstart import warm_start

from . import task

SEED = 0
VOCABULARY = 280
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
HELD_OUT = 96  # questions in development.jsonl (for tuning), and as many in test.jsonl
RECIPE = warm_start.Recipe(
    batch=64, learning_rate=4e-3, check_every=10, check_from=100, stop_at=0.2, temperature=1.0, max_steps=500
)


@dataclass(frozen=True)
class Setup:
    """The task, the number of training questions, and the warm start of a grid (its section `setup`).

    start_per_seed: each seed has a start of its own; otherwise all have the one of seed SEED. train: 256 are asked five
    times in 40 steps of 32, since HAPO compares responses with earlier ones.
    """

    task: task.TaskSettings = field(default_factory=task.TaskSettings)
    train: int = 256
    start_per_seed: bool = False
    recipe: warm_start.Recipe = RECIPE

    @classmethod
    def from_grid(cls, grid: Mapping[str, Any]) -> Setup:
        """The setup of a grid; what its section leaves out is as above."""
        section = dict(grid.get("setup", {}))
        recipe = replace(RECIPE, **section.pop("recipe", {}))
        return cls(task=task.TaskSettings(**section.pop("task", {})), recipe=recipe, **section)

    def start_seed(self, run_seed: int) -> int:
        return run_seed if self.start_per_seed else SEED


def prepare_questions(work: Path, setup: Setup) -> None:
    """Write tokenizer/, development.jsonl, test.jsonl and train.jsonl in `work`, unless they are there."""
    with _locked(work / "questions.lock"):
        if (work / "train.jsonl").exists():
            return
        test, development, train = split_problems(setup)
        texts = (f"{p.question}\n{p.solution}" for p in islice(draw_supervised(setup, SEED), 1024))
        tokenizer = tokenizers.train([*["user\nassistant\n"] * 300, *texts], VOCABULARY)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(work / "tokenizer")
        for name, problems in {"test": test, "development": development, "train": train}.items():
            (work / f"{name}.jsonl").write_text("".join(json.dumps(p.row()) + "\n" for p in problems))


def prepare_start(work: Path, setup: Setup, seed: int) -> Path:
    """The directory in `work` of the warm-started policy of a seed, made unless it is there; the questions are."""
    directory = work / f"start_{seed}"
    with _locked(work / f"start_{seed}.lock"):
        if not (directory / "model.safetensors").exists():
            torch.set_num_threads(1)
            tokenizer = Qwen2Tokenizer.from_pretrained(work / "tokenizer")
            unfinished = work / f"start_{seed}.part"
            tokenizer.save_pretrained(unfinished)  # now: the warm start sets padding, which would be saved too
            model = build_model(tokenizer, seed)
            recipe = setup.recipe
            supervised = list(islice(draw_supervised(setup, seed), recipe.batch * recipe.max_steps))
            warm_start.train(model, tokenizer, supervised, split_problems(setup)[1], recipe)
            model.save_pretrained(unfinished)
            unfinished.rename(directory)
    return directory


def identify_start(directory: Path) -> str:
    """A digest of a start's weights: records of one seed that have different ones cannot be compared."""
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()[:12]


def split_problems(setup: Setup) -> tuple[Sequence[task.Problem], ...]:
    """The problems for test, development and training, in this order; no two have the same numbers in one order."""
    problems = task.skip_repeated(task.draw_problems(SEED, setup.task))
    return tuple(list(islice(problems, size)) for size in (HELD_OUT, HELD_OUT, setup.train))


def draw_supervised(setup: Setup, seed: int) -> Iterator[task.Problem]:
    """Endless problems for a warm start; none is a test or development problem. They may repeat."""
    test, development, _ = split_problems(setup)
    held_out = {p.numbers for p in (*test, *development)}
    return (p for p in task.draw_problems(SEED + 1 + seed, setup.task) if p.numbers not in held_out)


def build_model(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2ForCausalLM:
    """A model with random weights and 0.1M parameters, about the smallest that learns the sums."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.09,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config).float()


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, which is made if it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
