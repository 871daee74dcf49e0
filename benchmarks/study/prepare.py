"""The inputs of all runs: a tokenizer, a warm-started policy, and three question files without common questions.

They are made once, in the study's work directory, from a fixed seed in one thread; it takes about a minute. They are
not in the repository.
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
HELD_OUT = 96  # questions in development.jsonl (for tuning), and as many in test.jsonl
TRAIN = 256  # asked five times in a run's 40 steps of 32, since HAPO compares responses with earlier ones
RECIPE = warm_start.Recipe(
    batch=64, learning_rate=4e-3, check_every=10, check_from=100, stop_at=0.2, temperature=1.0, max_steps=500
)


def prepare_inputs(work: Path, recipe: warm_start.Recipe = RECIPE) -> None:
    """Write model/, development.jsonl, test.jsonl and train.jsonl in the directory `work`, unless the model exists."""
    if (work / "model" / "model.safetensors").exists():
        return
    torch.set_num_threads(1)
    test, development, train, supervised = split_problems(recipe)
    tokenizer = tokenizers.train(
        [*["user\nassistant\n"] * 300, *(f"{p.question}\n{p.solution}" for p in supervised[:1024])], VOCABULARY
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(work / "model")  # now: the warm start sets padding, which would be saved too
    model = build_model(tokenizer)
    warm_start.train(model, tokenizer, supervised, development, recipe)
    for name, problems in {"test": test, "development": development, "train": train}.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(p.row()) + "\n" for p in problems))
    model.save_pretrained(work / "model")


def split_problems(recipe: warm_start.Recipe) -> tuple[Sequence[task.Problem], ...]:
    """The problems for test, development, training, and the warm start's supervised training, in this order.

    In the first three together, no two problems have the same numbers in the same order. The supervised problems
    repeat, and none of them has the numbers of a test or development problem in the same order.
    """
    problems = task.skip_repeated(task.draw_problems(SEED))
    test, development, train = (list(islice(problems, size)) for size in (HELD_OUT, HELD_OUT, TRAIN))
    held_out = {p.numbers for p in (*test, *development)}
    others = (p for p in task.draw_problems(SEED + 1) if p.numbers not in held_out)
    return test, development, train, list(islice(others, recipe.batch * recipe.max_steps))


def build_model(tokenizer: tokenizers.Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """A model with random weights and 0.1M parameters, about the smallest that learns the sums."""
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
