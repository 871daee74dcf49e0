"""`write_logits.py TOKENS DIRECTORY...` writes the logits of each model, in the environment of transformers 4.

TOKENS: a safetensors file with `ids` [1, S]. DIRECTORY/../NAME.logits.safetensors gets `logits` [1, S, v], in
float32, the dtype that config.json must name.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

assert transformers.__version__.startswith("4."), transformers.__version__
ids = load_file(sys.argv[1])["ids"]
for directory in map(Path, sys.argv[2:]):
    model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype="auto")
    assert str(model.dtype) == "torch.float32", model.dtype
    with torch.no_grad():
        logits = model(ids).logits
    save_file({"logits": logits}, directory.with_name(f"{directory.name}.logits.safetensors"))
