"""Contradictions between the keys of generation.*, and with the engine's Python, found before anything is built.

What only the engine knows (which quantisations, which options) it is asked when it starts. Must not import torch.
"""

from __future__ import annotations

import os
import shutil

from nemo_disco.config.schema import GenerationConfig, RunConfig
from nemo_disco.runtime.errors import UserError

# What the keys of the external engines are where they say nothing: the megatron engine has no use for another value.
_ITS_OWN = {
    "python": "the policy samples in its own process",
    "replicas": "it samples on the policy's own ranks",
    "tensor_parallel_size": "it has the policy's layout: set model.tensor_model_parallel_size",
    "nodes": "it samples on the policy's own ranks",
    "quantization": "it samples from the policy's own weights",
    "options": "it has no constructor of its own",
}


def check_engine(config: RunConfig) -> None:
    """Raises UserError for keys that the engine cannot follow."""
    generation = config.generation
    if generation.engine == "megatron":
        for key, why in _ITS_OWN.items():
            if (value := getattr(generation, key)) not in (None, 1, [], {}):
                raise UserError(f"generation.{key}={value} is nothing for generation=megatron: {why}; leave it out")
        if generation.asynchronous:
            raise UserError(
                "generation.asynchronous=true is nothing for generation=megatron: it samples in the processes that "
                "train; would work: generation=vllm or tensorrt_llm, with generation.colocated=false"
            )
        return
    if generation.python is None:
        raise UserError(
            f"generation.python: name the interpreter of an environment that has {generation.engine} (docs/engines.md)"
        )
    if generation.top_p < 1 or generation.top_k > 0:
        raise UserError(
            f"generation.top_p={generation.top_p}, generation.top_k={generation.top_k}: the log-probs of "
            f"{generation.engine} are then of the truncated distribution, and the trainer's are not; "
            "would work: top_p=1.0 and top_k=0, or generation=megatron"
        )
    if config.trainer.precision == "64":
        raise UserError(f"trainer.precision=64: {generation.engine} has no float64; would work: 32, bf16")
    if generation.nodes and len(set(generation.nodes)) < len(generation.nodes):
        raise UserError(f"generation.nodes={generation.nodes} names a host twice; set generation.replicas instead")
    if generation.asynchronous:
        _check_asynchronous(config)


def _check_asynchronous(config: RunConfig) -> None:
    if config.generation.colocated and not config.generation.nodes:
        raise UserError(
            "generation.asynchronous=true samples while the policy trains, and generation.colocated=true puts the "
            "engine to sleep then; would work: generation.colocated=false, or generation.nodes"
        )
    if config.algorithm.off_policy.get("kind") is None:
        raise UserError(
            "generation.asynchronous=true samples with the weights before: say what corrects for it, "
            "algorithm.off_policy.kind=truncated_importance_sampling, sequence_mask, or none"
        )


def check_python(generation: GenerationConfig) -> None:
    """Raises UserError if the engine's interpreter is not there (on hosts of their own it is not looked for)."""
    if generation.python is None or generation.nodes or shutil.which(generation.python):
        return
    found = "is not executable" if os.path.exists(generation.python) else "is not there"
    how = "make it with `make vllm`" if generation.engine == "vllm" else "make that environment first"
    raise UserError(f"generation.python={generation.python} {found}; {how} (docs/engines.md), or name another")
