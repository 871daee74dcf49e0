"""The four conversions, streamed: Hugging Face <-> torch_dist (megatron-core), <-> NeMo 2.0 directories around it.

Memory: one tensor and what it is made of. What is missing, unexpected or of another shape is fatal and named.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from nemo_disco.conversion.nemo_context import TOKENIZER, write_context
from nemo_disco.conversion.record import training_dtype, verify_files, write_record
from nemo_disco.conversion.torch_dist import TorchDistReader, TorchDistWriter
from nemo_disco.models.architecture import Architecture, Pairing, read_architecture
from nemo_disco.models.source import model_source
from nemo_disco.models.weight_files import SafetensorReader, check_tensors, copy_companions
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.files import atomic_directory
from nemo_disco.runtime.safetensor_writer import write_safetensors

CARRIED = "hugging_face"  # in a converted checkpoint: config, tokenizer, chat template, generation config
_LOCAL_NAMES = {  # of megatron-core's own layers, where norms are not fused into the linear layers that follow
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": "decoder.layers.input_layernorm.weight",
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": "decoder.layers.pre_mlp_layernorm.weight",
}


def hf_to_megatron(source: Path, out: Path) -> Path:
    """A Hugging Face directory -> a checkpoint directory, which loads at any layout. Raises UserError."""
    architecture = read_architecture(source)
    with _new(out) as work:
        _write_weights(source, work, architecture)
        write_record(work, source)
        copy_companions(source, work / CARRIED, architecture.config)
    return out


def megatron_to_hf(checkpoint: Path, out: Path, model: Path | None = None) -> Path:
    """A checkpoint (of a run, of hf_to_megatron, of megatron-core) -> a Hugging Face directory.

    model: the Hugging Face directory whose config and tokenizer are carried over (default: as the checkpoint or its run
    says). Tensors keep the type in which they are stored; those of a training run take the type that the config names,
    as its export does. Raises UserError.
    """
    model = model or Path(model_source(str(checkpoint)).hugging_face)
    verify_files(checkpoint)
    return _to_hf(checkpoint, model, out, training_dtype(checkpoint, model))


def hf_to_nemo(source: Path, out: Path) -> Path:
    """A Hugging Face directory -> a NeMo 2.0 directory: weights/ in torch_dist, context/ with tokenizer and model.

    Raises UserError.
    """
    architecture = read_architecture(source)
    with _new(out) as work:
        (work / "weights").mkdir()
        _write_weights(source, work / "weights", architecture, nemo=True)
        copy_companions(source, work / "context" / TOKENIZER, architecture.config)
        write_context(work / "context", architecture)
    return out


def nemo_to_hf(source: Path, out: Path, model: Path | None = None) -> Path:
    """A NeMo 2.0 directory -> a Hugging Face directory.

    model: whose config and tokenizer are carried over (default: those in context/). Raises UserError.
    """
    carried = source / "context" / TOKENIZER
    if model is None and not (carried / "config.json").is_file():
        raise UserError(f"{carried}: no config.json there; name the Hugging Face directory of this model with --model")
    if not (source / "weights").is_dir():
        raise UserError(f"{source}: no weights/ there; give a NeMo 2.0 directory (weights/ and context/)")
    return _to_hf(source / "weights", model or carried, out, None)


def _write_weights(source: Path, work: Path, architecture: Architecture, nemo: bool = False) -> None:
    """nemo: under NeMo's prefix, and with the empty FP8 states without which NeMo's reader loads nothing."""
    pairings, prefix = list(architecture.pairings()), "module." if nemo else ""
    with SafetensorReader(source) as reader:
        expected = {name: shape for pairing in pairings for name, shape in pairing.parts}
        reader.check(expected, architecture.tied)
        writer = TorchDistWriter(work)
        for pairing in pairings:
            parts = [reader.read(name) for name, _ in pairing.parts]
            if len({part.dtype for part in parts}) > 1:
                raise UserError(f"{source}: {', '.join(n for n, _ in pairing.parts)} are of different types")
            writer.add(prefix + pairing.key, architecture.join(pairing, parts), pairing.layer, architecture.layers)
            del parts
        for module, layer, layers in architecture.modules_with_state() if nemo else ():
            writer.add_empty_state(prefix + module, layer, layers)
        writer.close()


def _to_hf(weights: Path, model: Path, out: Path, dtype: torch.dtype | None) -> Path:
    architecture = read_architecture(model)
    reader = TorchDistReader(weights)
    stored = {(p.key, p.layer): _stored(reader, p) for p in architecture.pairings()}
    places = zip(architecture.pairings(), stored.values(), strict=True)
    shapes = {name: _full_shape(architecture, pairing, layer) for pairing, (name, layer) in places}
    found = {name: reader.shape(name) for name in reader.names()}
    for name in {"embedding.word_embeddings.weight", "output_layer.weight"} & found.keys() & shapes.keys():
        if found[name][0] >= architecture.vocab:  # rows that pad the vocabulary
            found[name] = (architecture.vocab, *found[name][1:])
    check_tensors(weights, shapes, found)
    plan = [
        (name, shape, dtype or reader.dtype(stored[p.key, p.layer][0]))
        for p in architecture.pairings()
        for name, shape in p.parts
    ]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for pairing in architecture.pairings():
            whole = reader.read(*stored[pairing.key, pairing.layer])[: pairing.shape[0]]
            for (name, _), part in zip(pairing.parts, architecture.split(pairing, whole), strict=True):
                yield name, part if dtype is None else part.to(dtype)

    with _new(out) as work:
        write_safetensors(work, plan, tensors())
        copy_companions(model, work, architecture.config)
    return out


def _stored(reader: TorchDistReader, pairing: Pairing) -> tuple[str, int | None]:
    """Where a checkpoint has a tensor: (name, row), by the naming that it uses."""
    name = pairing.key if pairing.key in reader.names() else _LOCAL_NAMES.get(pairing.key, pairing.key)
    if name in reader.names() or pairing.layer is None:
        return name, pairing.layer
    for key in (pairing.key, name):
        numbered = key.replace("decoder.layers.", f"decoder.layers.{pairing.layer}.")
        if numbered in reader.names():
            return numbered, None
    return pairing.key, pairing.layer


def _full_shape(architecture: Architecture, pairing: Pairing, layer: int | None) -> tuple[int, ...]:
    return pairing.shape if layer is None else (architecture.layers, *pairing.shape)


@contextmanager
def _new(out: Path) -> Iterator[Path]:
    """A directory that appears whole or not at all. Raises UserError if it is there already."""
    if out.exists():
        raise UserError(f"{out} exists already: name a directory that does not")
    with atomic_directory(out) as work:
        yield work
