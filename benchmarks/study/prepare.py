"""The start of every run: a tokenizer, a warm-started policy, and three question files that never meet.

Seeded, one thread, about a minute. Made once into a study's work directory; nothing of it is committed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from tools.quickstart import tokenizer as tokenizers
from tools.quickstart import warm_start

from . import task

SEED = 0
VOCABULARY = 280
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
HELD_OUT = 96  # questions to tune on, and as many to test on
TRAIN = 256  # asked five times in a run's 40 steps of 32: HAPO compares a question with its earlier answers
RECIPE = warm_start.Recipe(
    batch=64, learning_rate=4e-3, check_every=10, check_from=100, stop_at=0.2, temperature=1.0, max_steps=500
)


def prepare(work: Path, recipe: warm_start.Recipe = RECIPE) -> None:
    """work/model, work/development.jsonl, work/test.jsonl, work/train.jsonl; nothing is done if they are there."""
    if (work / "model" / "model.safetensors").exists():
        return
    torch.set_num_threads(1)
    test, development, train, supervised = splits(recipe)
    tokenizer = tokenizers.train(
        [*["user\nassistant\n"] * 300, *(f"{p.question}\n{p.solution}" for p in supervised[:1024])], VOCABULARY
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(work / "model")  # before the warm start pads with it: padding is part of its files
    model = new_model(tokenizer)
    warm_start.train(model, tokenizer, supervised, development, recipe)
    for name, problems in {"test": test, "development": development, "train": train}.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(p.row()) + "\n" for p in problems))
    model.save_pretrained(work / "model")


def splits(recipe: warm_start.Recipe) -> tuple[Sequence[task.Problem], ...]:
    """test, development, train, supervised. No two of the first three have the same numbers in the same order; the
    last, which repeats itself, has none of the held-out ones."""
    problems = task.distinct(task.stream(SEED))
    test, development, train = (list(islice(problems, size)) for size in (HELD_OUT, HELD_OUT, TRAIN))
    held_out = {p.numbers for p in (*test, *development)}
    others = (p for p in task.stream(SEED + 1) if p.numbers not in held_out)
    return test, development, train, list(islice(others, recipe.batch * recipe.max_steps))


def new_model(tokenizer: tokenizers.Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """Random weights, 0.1M parameters: as little as works the sums."""
    torch.manual_seed(SEED)
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
