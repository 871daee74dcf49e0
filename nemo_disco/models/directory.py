"""Hints for a path that is not a Hugging Face model directory: what is there instead, and what to do about it.

Looks at the names of files, never at their content.
"""

from __future__ import annotations

import re
from pathlib import Path

from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.files import backup_path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Starts of the names of safetensors files in other formats: Mistral's and Meta's own, and LoRA's.
_OTHER_FORMATS = ("consolidated", "adapter_model")
_MODELS = Path("models")  # where the recipes expect a model; not an owner on the Hub


def explain(directory: Path) -> str | None:
    """A line on what to do about a path without the config.json of a whole model; None if it has one."""
    if not directory.exists():
        return _explain_missing(directory)
    if not directory.is_dir():
        return _explain_file(directory)
    if (directory / "adapter_config.json").is_file():
        return (
            f"{directory}: a LoRA adapter (adapter_config.json), not a whole model: merge it into its base model "
            "(peft: merge_and_unload().save_pretrained(DIR)) and give that directory"
        )
    if (directory / "config.json").exists():
        return None
    return f"{directory}: no Hugging Face model there: {_explain_directory(directory)}"


def safetensor_names(directory: Path) -> list[str]:
    """Names of the model's *.safetensors files. Raises UserError if there are none, with a hint on what is there."""
    names = sorted(p.name for p in directory.glob("*.safetensors"))
    names = [name for name in names if not name.startswith(_OTHER_FORMATS)]
    if not names:
        raise UserError(f"{directory}: no *.safetensors file of the model there: {_explain_weights(directory)}")
    return names


def _explain_weights(directory: Path) -> str:
    """A line on the weights of a directory without safetensors, and what to do about them."""
    names = sorted(p.name for p in directory.iterdir())
    if any(name.startswith("consolidated") for name in names):
        return "consolidated.* is the format of its maker's own code: fetch the model-*.safetensors files beside it"
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return f"{gguf[0]} is a GGUF file, made for llama.cpp: {_ORIGINAL}"
    pickled = [n for n in names if n.endswith((".bin", ".pth", ".pt", ".ckpt")) and not n.startswith("training_args")]
    if pickled:
        return f"{pickled[0]} is pickled and is not opened: convert it to safetensors"
    other = [name for name in names if name.endswith((".h5", ".msgpack", ".onnx", ".npz"))]
    return f"{other[0]} is not read: convert it to safetensors" if other else "fetch them"


_ORIGINAL = "give the Hugging Face directory it was made from (config.json, tokenizer, *.safetensors)"


def _explain_missing(path: Path) -> str:
    if _HUB_ID.fullmatch(str(path)) and path.parent != _MODELS and not path.parent.exists():
        return (
            f"{path}: no Hugging Face model there; if it is a name on the Hugging Face Hub: nothing is downloaded "
            f"here, so `hf download {path} --local-dir {_MODELS / path.name}` and give {_MODELS / path.name}"
        )
    if backup_path(path).is_dir():
        return (
            f"{path}: no such directory, but {backup_path(path)} is there: a run is replacing it, or was killed while "
            "it did; try again in a moment, or start that run again, which puts it back"
        )
    return f"{path}: no Hugging Face model there: no such directory; docs/model.md says how to get one"


def _explain_file(path: Path) -> str:
    if path.suffix == ".gguf":
        return f"{path}: a GGUF file, made for llama.cpp: {_ORIGINAL}"
    return f"{path}: a file; give the Hugging Face directory that it is in ({path.parent})"


def _explain_directory(directory: Path) -> str:
    """A line on what a directory without config.json is, and what to give instead."""
    if snapshots := sorted(directory.glob("snapshots/*/config.json")):
        newest = max(snapshots, key=lambda p: p.stat().st_mtime).parent
        return f"it is a model's place in the Hugging Face cache; give the snapshot in it: {newest}"
    cached = sorted(p for p in directory.glob("models--*") or [] if p.is_dir())
    cached = cached or sorted(p for p in directory.glob("hub/models--*") if p.is_dir())
    if cached:
        config = next((s for p in cached for s in sorted(p.glob("snapshots/*/config.json"))), None)
        example = f", such as {config.parent}" if config else ""
        return f"it is the Hugging Face cache, with {len(cached)} models in it; give the snapshot of one{example}"
    if (directory / "checkpoint.json").is_file():
        return "it is a checkpoint, which `evaluate` reads; to go on from its weights, convert it with megatron_to_hf"
    if (directory / "config.yaml").is_file():
        export = directory / "export"
        trained = f"its trained model is {export}" if export.is_dir() else "it has no export/ yet"
        return f"it is the directory of a run, whose checkpoints `evaluate` reads; {trained}"
    if any(directory.glob("*.gguf")):
        return _explain_weights(directory)
    if nested := sorted(directory.glob("*/config.json")):
        return f"no config.json, but there is one in {nested[0].parent}: give that directory"
    if (directory / "params.json").is_file():
        return "params.json is of Mistral's or Meta's own format; fetch the model's Hugging Face files"
    return "no config.json"
