"""A byte-level BPE tokenizer with a chat template, trained on given text.

Every byte is in its alphabet, so that decoding restores any text, except for Unicode's NFC normalisation: transformers
applies it to every Qwen2 directory, whatever its files say, so this is a Qwen2 tokenizer. Each digit is one token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PIECES = ("<think>", "</think>", "\\boxed{")  # ordinary text that gets one token each
# Words that are common in real mathematics, which then takes fewer tokens.
COMMON_WORDS = (
    " the of and is in to for that be if such with are what find value let all as number integer integers positive"
    " real equation function triangle circle point angle area length ratio probability sequence polynomial greatest"
    " least smallest largest common divisor multiple prime factor remainder divided sum product difference square root"
    " expressed form where when then each between possible many different solve compute determine express answer"
    " simplified fraction frac sqrt left right cdot text begin end"
)
SUFFIX = "Let's think step by step and output the final answer within "
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)


def train(texts: Iterable[str], vocabulary: int) -> Qwen2Tokenizer:
    """A tokenizer of exactly `vocabulary` tokens. Raises ValueError if the text gives too few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(PIECES),
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    result = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        unk_token=None,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    result.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in PIECES])
    if len(result) != vocabulary:
        raise ValueError(f"the text gives {len(result)} tokens instead of {vocabulary}: train on more text")
    return result
