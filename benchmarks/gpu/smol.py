"""Convert SmolLM2-135M-Instruct from its GGUF file to a Hugging Face directory, and write questions for it.

    python3 benchmarks/gpu/smol.py FILE.gguf OUT      writes OUT/model, OUT/train.jsonl and OUT/test.jsonl

The questions are sums, differences and products in words. The model sometimes answers them, so that reinforcement
learning can improve it within minutes. The two files share no question.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

TEST, TRAIN = 256, 4096  # questions
NAMES, OBJECTS = ["Sam", "Zoe", "Mia", "Jack", "Ana", "Leo", "Kim", "Max"], ["eggs", "coins", "pens", "books"]
END_OF_TURN = "<|im_end|>"  # the GGUF file names another token, which the model never writes at the end of a turn


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: smol.py FILE.gguf OUT")
    gguf, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps(question) + "\n" for question in make_questions(TEST + TRAIN)]
    (out / "test.jsonl").write_text("".join(rows[:TEST]))
    (out / "train.jsonl").write_text("".join(rows[TEST:]))
    write_model(gguf, out / "model")


def make_questions(count: int, seed: int = 1) -> list[dict[str, str]]:
    """`count` different questions, as records of a question file."""
    generator = random.Random(seed)
    answers: dict[str, str] = {}
    while len(answers) < count:
        text, answer = make_question(generator)
        answers.setdefault(text, str(answer))
    return [{"problem": text, "answer": answer} for text, answer in answers.items()]


def make_question(generator: random.Random) -> tuple[str, int]:
    """The text of a random question, and its answer."""
    name, thing = generator.choice(NAMES), generator.choice(OBJECTS)
    a, b, c = generator.randint(11, 60), generator.randint(5, 49), generator.randint(2, 9)
    each = b % 9 + 2
    return generator.choice(
        [
            (f"{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?", a + b),
            (f"{name} has {a + b} {thing} and gives away {b}. How many {thing} are left?", a),
            (f"{name} has {c} boxes with {each} {thing} in each. How many {thing} are there?", c * each),
            (f"{name} has {a} {thing}, buys {b} more and then loses {c}. How many {thing} are left?", a + b - c),
        ]
    )


def write_model(gguf: Path, out: Path) -> None:
    """Write the GGUF file's weights, dequantised to bfloat16, and its tokenizer as a Llama in Hugging Face's format."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    dequantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The dequantised model's config also has the names of the file's fields, and its quantisation.
    keys = LlamaConfig().to_dict().keys()
    config = {key: value for key, value in dequantised.config.to_dict().items() if key in keys}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(dequantised.state_dict())
    for settings in (model.config, model.generation_config):
        settings.eos_token_id, settings.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
