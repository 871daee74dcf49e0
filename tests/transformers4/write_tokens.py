"""`write_tokens.py TEXTS DIRECTORY...` writes each tokenizer's tokens, in the environment of transformers 4.

TEXTS: a JSON file with a list. DIRECTORY/../NAME.tokens.json gets `ids`, a list for each text; `special`, the special
tokens; and `prompt`, a question after the chat template.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import transformers
from transformers import AutoTokenizer

assert transformers.__version__.startswith("4."), transformers.__version__
texts = json.loads(Path(sys.argv[1]).read_text())
for directory in map(Path, sys.argv[2:]):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    record = {
        "ids": tokenizer(texts, add_special_tokens=False)["input_ids"],
        "special": sorted(tokenizer.all_special_tokens),
        "prompt": tokenizer.apply_chat_template(
            [{"role": "user", "content": "1 + 1?"}], tokenize=False, add_generation_prompt=True
        ),
    }
    directory.with_name(f"{directory.name}.tokens.json").write_text(json.dumps(record))
