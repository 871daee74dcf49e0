"""The four conversions: Hugging Face <-> torch_dist (megatron-core), and <-> NeMo 2.0 directories, which contain it.

Needs the memory of one tensor and its parts. A tensor that is missing, unexpected or of another shape is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from nemo_disco.conversion.nemo_context import TOKENIZER, write_context
from nemo_disco.conversion.record import training_dtype, verify_files, write_converted_record
from nemo_disco.conversion.torch_dist import TorchDistReader, TorchDistWriter
from nemo_disco.models.architecture import EMBEDDING, OUTPUT
from nemo_disco.models.hf_config import read_hf_config
from nemo_disco.models.shape import ModelShape, ModelWeight, model_shape
from nemo_disco.models.source import model_source
from nemo_disco.models.weight_files import SafetensorReader, check_tensors, copy_companions
from nemo_disco.models.weight_layout import shard, unshard
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.files import atomic_directory
from nemo_disco.runtime.safetensor_writer import write_safetensors

HF_FILES = "hugging_face"  # directory in a converted checkpoint: config, tokenizer, chat template, generation config


def hf_to_megatron(source: Path, out: Path) -> Path:
    """Convert a Hugging Face directory to a checkpoint, which loads at any layout. Returns `out`. Raises UserError."""
    config = read_hf_config(source)
    with _new_directory(out) as work:
        _write_weights(source, work, model_shape(config))
        write_converted_record(work, source)
        copy_companions(source, work / HF_FILES, config)
    return out


def megatron_to_hf(checkpoint: Path, out: Path, model: Path | None = None) -> Path:
    """Convert a checkpoint (of a run, of hf_to_megatron, of megatron-core) to a Hugging Face directory. Returns `out`.

    model: the Hugging Face directory whose config and tokenizer are copied (default: the one in the checkpoint, else
    the one that its run names). Tensors keep their type; those of a training run get the type in the config, as in its
    export. Raises UserError.
    """
    model = model or Path(model_source(str(checkpoint)).hugging_face)
    verify_files(checkpoint)
    return _to_hf(checkpoint, model, out, training_dtype(checkpoint, model))


def hf_to_nemo(source: Path, out: Path) -> Path:
    """Convert a Hugging Face directory to a NeMo 2.0 one: weights/ in torch_dist, context/ with tokenizer and model.

    Returns `out`. Raises UserError.
    """
    config = read_hf_config(source)
    with _new_directory(out) as work:
        for part in ("weights", "context"):
            (work / part).mkdir()
        write_context(work / "context", config)  # first, since it may refuse
        _write_weights(source, work / "weights", model_shape(config), nemo=True)
        copy_companions(source, work / "context" / TOKENIZER, config)
    return out


def nemo_to_hf(source: Path, out: Path, model: Path | None = None) -> Path:
    """Convert a NeMo 2.0 directory to a Hugging Face directory. Returns `out`.

    model: the Hugging Face directory whose config and tokenizer are copied (default: context/). Raises UserError.
    """
    hf_files = source / "context" / TOKENIZER
    if model is None and not (hf_files / "config.json").is_file():
        raise UserError(f"{hf_files}: no config.json there; name the Hugging Face directory of this model with --model")
    if not (source / "weights").is_dir():
        raise UserError(f"{source}: no weights/ there; give a NeMo 2.0 directory (weights/ and context/)")
    return _to_hf(source / "weights", model or hf_files, out, None)


def _write_weights(source: Path, work: Path, shape: ModelShape, nemo: bool = False) -> None:
    """Write a torch_dist checkpoint. nemo: with NeMo's prefix, and the empty FP8 states that NeMo's reader needs."""
    prefix = "module." if nemo else ""
    with SafetensorReader(source) as reader:
        reader.check(shape.tensors(), shape.tied)
        writer = TorchDistWriter(work)
        for weight in shape.weights():
            parts = [reader.read(name) for name, _ in weight.parts]
            if len({part.dtype for part in parts}) > 1:
                raise UserError(f"{source}: {', '.join(n for n, _ in weight.parts)} are of different types")
            writer.add(prefix + weight.key, shard(weight, parts), weight.row, weight.rows)
            del parts
        for module, layer, layers in shape.modules_with_fp8_state() if nemo else ():
            writer.add_empty_state(prefix + module, layer, layers)
        writer.close()


def _to_hf(weights: Path, model: Path, out: Path, dtype: torch.dtype | None) -> Path:
    config = read_hf_config(model)
    shape, reader = model_shape(config), TorchDistReader(weights)
    places = [(weight, *_place(reader, weight)) for weight in shape.weights()]
    expected = {key: (*weight.rows[len(weight.rows) - len(row) :], *weight.shape) for weight, key, row in places}
    stored = {name: reader.shape(name) for name in reader.names}
    for name in {EMBEDDING.name, OUTPUT.name} & stored.keys() & expected.keys():
        if stored[name][0] >= shape.vocab:  # rows that pad the vocabulary
            stored[name] = (shape.vocab, *stored[name][1:])
    check_tensors(weights, expected, stored)
    plan = [(name, part, dtype or reader.dtype(key)) for weight, key, _ in places for name, part in weight.parts]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for weight, key, row in places:
            for name, part in unshard(weight, [reader.read(key, row)]):
                yield name, part if dtype is None else part.to(dtype)

    with _new_directory(out) as work:
        write_safetensors(work, plan, tensors())
        copy_companions(model, work, config)
    return out


def _place(reader: TorchDistReader, weight: ModelWeight) -> tuple[str, tuple[int, ...]]:
    """Key and row (empty: the whole tensor) of a weight, by the naming that the checkpoint uses."""
    keys = (weight.key, weight.local_key, weight.grouped_key)
    # With the layers numbered, a checkpoint may still stack the experts of each.
    experts = weight.row[1:]
    numbered = [(weight.full_name(key), () if "{expert}" in key else experts) for key in keys]
    places: list[tuple[str, tuple[int, ...]]] = [*((key, weight.row) for key in keys), *numbered]
    return next((place for place in places if place[0] in reader.names), places[0])


@contextmanager
def _new_directory(out: Path) -> Iterator[Path]:
    """Context with a directory to write into, which becomes `out` once complete. Raises UserError if `out` exists."""
    if out.exists():
        raise UserError(f"{out} exists already: name a directory that does not")
    with atomic_directory(out) as work:
        yield work
