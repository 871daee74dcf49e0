"""Between a step's micro-batches the program never asks for a value: on a GPU each would be a wait for all its work.

On a CPU nothing waits, so what would is forbidden while megatron's schedule runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models import model_config, random_rollouts, save_model
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_disco.policy import log_probs, parallel
from nemo_disco.policy import policy as policy_module
from nemo_disco.policy.policy import Policy

# Operators whose result, or its shape, the host has to know.
ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero", "repeat_interleave")


class NoWaiting(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ASKING, f"{func} would wait for the device"
        if name in ("index", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), f"{func} with a mask would wait"
        NoWaiting.calls += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a tensor was read on the host")

    with monkeypatch.context() as patch, NoWaiting():
        for method in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__"):
            patch.setattr(torch.Tensor, method, refuse)
        yield


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Policy:
    """Whose schedule runs without waiting, and whose log-probs behave as on a GPU."""
    config = model_config(save_model(tmp_path, "qwen2", tied=True), token_budget=64)
    parallel.start(config)
    schedule: Callable[..., Any] = policy_module.get_forward_backward_func()

    def guarded(**arguments: Any) -> Any:
        assert arguments["num_microbatches"] > 1
        with no_waiting(monkeypatch):
            return schedule(**arguments)

    build = policy_module.build_micro_batch

    def with_buckets(*args: Any, **kwargs: Any) -> Any:
        batch = build(*args, **kwargs)
        assert batch.sequences.buckets, "a CPU's plan of attention, made on the host; a GPU's kernel needs none"
        return batch

    monkeypatch.setattr(policy_module, "build_micro_batch", with_buckets)
    monkeypatch.setattr(policy_module, "get_forward_backward_func", lambda: guarded)
    monkeypatch.setattr(log_probs, "_may_look", lambda _: False)
    return Policy(config)


def test_log_probs_and_gradients_never_wait(policy: Policy) -> None:
    rollouts = random_rollouts()
    before = NoWaiting.calls
    policy.log_probs(rollouts, entropies=True)
    policy.accumulate(rollouts, lambda _, log_probs, entropy: log_probs + entropy, entropies=True)
    assert NoWaiting.calls > before + 100, "the schedule ran outside the guard"


@pytest.mark.parametrize("ask", [torch.Tensor.item, torch.nonzero, lambda x: x[x > 0], lambda x: x.sum() > 0 and 1])
def test_the_guard_sees_what_waits(ask: Callable[[torch.Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError), no_waiting(monkeypatch):
        ask(torch.ones(1))
