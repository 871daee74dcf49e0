"""The record of a checkpoint (checkpoint.json): step, code versions, layout, dtype, model and RNG state.

Builds it from a policy and checks that it fits one; touches no file.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, cast

import megatron.core
import torch

import nemo_disco
from nemo_disco.checkpoint import files
from nemo_disco.models.rope import has_long_angles
from nemo_disco.policy.policy import Policy
from nemo_disco.runtime.errors import UserError


def identity(policy: Policy, step: int) -> dict[str, Any]:
    """The fields of the record that follow from the policy."""
    ranks, config = policy.ranks, policy.config
    assert policy.optimizer is not None
    return {
        "format": files.FORMAT,
        "step": step,
        "code": {
            "nemo_disco": nemo_disco.__version__,
            "torch": torch.__version__,
            "megatron_core": megatron.core.__version__,
        },
        "layout": {
            "tensor_model_parallel_size": ranks.tensor_size,
            "pipeline_model_parallel_size": ranks.pipeline_size,
            "virtual_pipeline_model_parallel_size": config.virtual_pipeline_model_parallel_size,
            "context_parallel_size": ranks.context_size,
            "expert_model_parallel_size": config.expert_model_parallel_size,
            "expert_tensor_parallel_size": config.expert_tensor_parallel_size,
            "sequence_parallel": config.sequence_parallel,
            "data_parallel_size": ranks.data_size,
        },
        "dtype": _dtype(policy),
        "optimizer": {"name": config.optim.name, "steps": policy.optimizer.steps},
        "model": _model(policy),
    }


def _model(policy: Policy) -> dict[str, Any]:
    model = policy.shape.identity(policy.hf_config)
    model["long angles of longrope"] = has_long_angles(policy.hf_config, policy.longest) or None
    return cast(dict[str, Any], json.loads(json.dumps(model)))  # as after reading


def _dtype(policy: Policy) -> str:
    return str(policy.dtype).removeprefix("torch.")


def check_fits(policy: Policy, path: Path, record: dict[str, Any]) -> None:
    """Raises UserError unless the checkpoint at `path` can be loaded into the policy."""
    if record["format"] > files.FORMAT:
        raise UserError(f"checkpoint {path} was written by a newer version: {record['code']}")
    if policy.optimizer is not None and record["optimizer"] is None:
        raise UserError(
            f"checkpoint {path} was converted and holds weights alone; to train from them, turn it into a Hugging Face "
            "directory (megatron_to_hf) and set model.path to that"
        )
    saved = record["model"]
    differences = [
        f"{name} is {saved.get(name)} there and {value} here"
        for name, value in _model(policy).items()
        if saved.get(name) != value
    ]
    if differences:
        raise UserError(
            f"checkpoint {path} is of another model than {policy.config.path}: {'; '.join(differences)}; set "
            "model.path to that model, or exp_manager.explicit_log_dir to another directory"
        )
    saved_dtype, dtype = record["dtype"], _dtype(policy)
    if policy.optimizer is not None and saved_dtype != dtype:
        raise UserError(
            f"checkpoint {path} was written with dtype {saved_dtype}, this run has {dtype}: set trainer.precision as "
            "it was, or start another run from its export"
        )


def random_state() -> dict[str, str]:
    """torch's RNG state of this process, base64, by device type."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return {device: base64.b64encode(s.numpy().tobytes()).decode() for device, s in state.items()}


def restore_random_state(state: dict[str, str]) -> None:
    """Set torch's RNG to a state that `random_state` returned; CUDA's only where CUDA is available."""
    restore = {"cpu": torch.set_rng_state, "cuda": torch.cuda.set_rng_state}
    for device, encoded in state.items():
        if device == "cpu" or torch.cuda.is_available():
            restore[device](torch.frombuffer(bytearray(base64.b64decode(encoded)), dtype=torch.uint8))
