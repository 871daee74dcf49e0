"""While an engine samples, the policy frees the memory of gradient and optimizer, which does not change training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import model_config, save_model
from training import fingerprint, train

from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("qwen2"), "qwen2", tied=True)


def build(path: Path, dtype: torch.dtype, offload: bool) -> Policy:
    config = model_config(path)
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"offload": offload})})
    parallel.start(config)
    return Policy(config, dtype=dtype)


def measure_memory(policy: Policy) -> tuple[int, int]:
    """Bytes on the device of the gradients and of the optimizer's state."""
    assert policy.optimizer is not None
    gradients = [buffer.grad_data for chunk in policy.network for buffer in chunk.buffers]
    state = policy.optimizer._state_tensors()
    return tuple(sum(t.untyped_storage().nbytes() for t in tensors) for tensors in (gradients, state))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offload", [False, True])
def test_resting_frees_memory_and_changes_nothing(model_path: Path, dtype: torch.dtype, offload: bool) -> None:
    policy = build(model_path, dtype, offload)
    for seed in (1, 2, 3):
        with policy.resting():
            gradients, state = measure_memory(policy)
            assert gradients == 0
            assert (state == 0) == (offload or (seed == 1 and dtype is torch.float32))
            weights = [w.clone() for _, w in policy.named_weights()]
        assert all(torch.equal(w, after) for w, (_, after) in zip(weights, policy.named_weights(), strict=True))
        train(policy, [seed])
    undisturbed = build(model_path, dtype, offload=False)
    train(undisturbed, [1, 2, 3])
    assert fingerprint(policy) == fingerprint(undisturbed)


def test_a_policy_without_an_optimizer_can_rest(model_path: Path) -> None:
    config = model_config(model_path)
    parallel.start(config)
    with Policy(config, trainable=False).resting():
        pass
