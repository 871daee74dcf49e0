"""SmolLM2-135M-Instruct from its GGUF file to a Hugging Face directory, and questions for it.

    python3 benchmarks/gpu/smol.py FILE.gguf OUT      writes OUT/model, OUT/train.jsonl and OUT/test.jsonl

The questions are sums, differences and products in words, which the model answers now and then: what a reinforcement
learner can improve within minutes. The two files share no question.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

TEST, TRAIN = 256, 4096
NAMES, THINGS = ["Sam", "Zoe", "Mia", "Jack", "Ana", "Leo", "Kim", "Max"], ["eggs", "coins", "pens", "books"]
END_OF_TURN = "<|im_end|>"  # the file names another token, with which the model never ends a turn


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: smol.py FILE.gguf OUT")
    gguf, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps(question) + "\n" for question in questions(TEST + TRAIN)]
    (out / "test.jsonl").write_text("".join(rows[:TEST]))
    (out / "train.jsonl").write_text("".join(rows[TEST:]))
    write_model(gguf, out / "model")


def questions(count: int, seed: int = 1) -> list[dict[str, str]]:
    """So many different ones."""
    draw = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        text, answer = question(draw)
        found.setdefault(text, str(answer))
    return [{"problem": text, "answer": answer} for text, answer in found.items()]


def question(draw: random.Random) -> tuple[str, int]:
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    a, b, c = draw.randint(11, 60), draw.randint(5, 49), draw.randint(2, 9)
    each = b % 9 + 2
    return draw.choice(
        [
            (f"{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?", a + b),
            (f"{name} has {a + b} {thing} and gives away {b}. How many {thing} are left?", a),
            (f"{name} has {c} boxes with {each} {thing} in each. How many {thing} are there?", c * each),
            (f"{name} has {a} {thing}, buys {b} more and then loses {c}. How many {thing} are left?", a + b - c),
        ]
    )


def write_model(gguf: Path, out: Path) -> None:
    """The file's weights in bfloat16, as a plain Llama without its quantisation."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    dequantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    known = LlamaConfig().to_dict().keys()  # the file brings names, and its quantisation
    config = {key: value for key, value in dequantised.config.to_dict().items() if key in known}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(dequantised.state_dict())
    for settings in (model.config, model.generation_config):
        settings.eos_token_id, settings.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
