"""The quickstart's warm start: supervised training of a tiny Qwen2 model on right solutions, stopped early.

One process, on the device of the model; reads and writes no files. A development split decides when it stops, never
the test set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from .task import Problem

IGNORED = -100  # the label of a token that is not trained on: cross_entropy's default
MAX_RESPONSE = 64  # tokens; more than the longest solution has


@dataclass(frozen=True)
class Recipe:
    """Training settings of the warm start, and the accuracy at which it stops."""

    batch: int = 32
    learning_rate: float = 2e-3
    warmup: int = 30
    check_every: int = 10
    check_from: int = 150
    stop_at: float = 0.32  # Pass@1 on the development split, sampled at `temperature`
    temperature: float = 1.0
    max_steps: int = 400


@dataclass(frozen=True)
class Accuracy:
    pass_at_1: float
    pass_at_8: float
    greedy: float

    def __str__(self) -> str:
        return f"Pass@1 {self.pass_at_1:.3f}, pass@8 {self.pass_at_8:.3f}, greedy {self.greedy:.3f}"


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """A model with random weights; TP 4 and PP 4 divide its shape."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.06,  # about hidden_size ** -0.5: at the default 0.02 learning to copy takes twice as long
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config).float()


def train(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    development: Sequence[Problem],
    recipe: Recipe,
) -> None:
    """Train in one pass over `problems`, until Pass@1 on `development` reaches recipe.stop_at.

    Raises RuntimeError if it stays below that for recipe.max_steps.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    for step in range(1, recipe.max_steps + 1):
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * min(1.0, step / recipe.warmup)
        tokens, labels = batch(tokenizer, problems[(step - 1) * recipe.batch : step * recipe.batch])
        logits = model(input_ids=tokens.to(model.device)).logits[:, :-1]
        targets = labels[:, 1:].flatten().to(model.device)
        loss = cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step < recipe.check_from or step % recipe.check_every:
            continue
        pass_at_1 = sample_verdicts(model, tokenizer, development, 4, recipe.temperature).mean().item()
        print(f"step {step}: loss {loss.item():.3f}, development Pass@1 {pass_at_1:.3f}", flush=True)
        if pass_at_1 >= recipe.stop_at:
            return
    raise RuntimeError(f"Pass@1 did not reach {recipe.stop_at} in {recipe.max_steps} steps")


def prompt(tokenizer: PreTrainedTokenizerFast, problem: Problem) -> str:
    """The problem's text under the chat template, up to where the response starts."""
    message = [{"role": "user", "content": problem.question}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def batch(tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]) -> tuple[Tensor, Tensor]:
    """Tokens and labels, both [batch, longest], padded on the right; only the response has labels."""
    prompts = [tokenizer.encode(prompt(tokenizer, p)) for p in problems]
    responses = [[*tokenizer.encode(p.solution), tokenizer.eos_token_id] for p in problems]
    longest = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    tokens = torch.full((len(problems), longest), tokenizer.pad_token_id)
    labels = torch.full((len(problems), longest), IGNORED)
    for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        end = len(p) + len(r)
        tokens[i, :end] = torch.tensor(p + r)
        labels[i, len(p) : end] = torch.tensor(r)
    return tokens, labels


@torch.inference_mode()
def sample_verdicts(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    samples: int,
    temperature: float,
) -> Tensor:
    """Verdicts of sampled responses [problems, samples]: 1.0 if complete and right, else 0. Temperature 0 is greedy."""
    inputs = tokenizer([prompt(tokenizer, p) for p in problems], return_tensors="pt", padding=True, padding_side="left")
    inputs = inputs.to(model.device)
    options = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    out = model.generate(**inputs, **options, num_return_sequences=samples, max_new_tokens=MAX_RESPONSE)
    texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ends = [f"</think>\n\\boxed{{{p.answer}}}" for p in problems for _ in range(samples)]
    right = [text.endswith(end) and text.count("</think>") == 1 for text, end in zip(texts, ends, strict=True)]
    return torch.tensor(right, dtype=torch.float32).view(len(problems), samples)


def accuracy(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], temperature: float
) -> Accuracy:
    """Pass@1 (avg@8), pass@8 and greedy accuracy, as the quickstart's table shows them."""
    right = sample_verdicts(model, tokenizer, problems, 8, temperature)
    greedy = sample_verdicts(model, tokenizer, problems, 1, 0.0)
    return Accuracy(right.mean().item(), right.amax(1).mean().item(), greedy.mean().item())
