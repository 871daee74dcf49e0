"""Between a step's micro-batches the program reads no value of a tensor, since on a GPU it would wait for all work.

As nothing waits on a CPU, the tests forbid the calls that would wait on a GPU while megatron's schedule runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import model_config, random_rollouts, save_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_disco.policy import log_probs, parallel
from nemo_disco.policy import policy as policy_module
from nemo_disco.policy.micro_batch import MicroBatch, Padding, build_micro_batch
from nemo_disco.policy.policy import Policy

# Operators that copy their result, or its shape, to the host.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero", "repeat_interleave")


class NoWaiting(TorchDispatchMode):
    """Forbids operators that would wait for the device, and counts all calls."""

    calls = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITING, f"{func} would wait for the device"
        if name in ("index", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), f"{func} with a mask would wait"
        NoWaiting.calls += 1
        return func(*args, **(kwargs or {}))


class NoCopiesFromHost(TorchFunctionMode):
    """Forbids copies of tensors from the host, for which CUDA waits if the memory is not page-locked. All tensors are
    on one device here, so the functions that would copy are refused by name; a single number on the host is allowed."""

    MAKERS = (torch.zeros, torch.ones, torch.full, torch.empty, torch.arange)
    COPIES = (torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.cuda)

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        device = keywords.get("device")
        if func in self.MAKERS:
            assert device is not None, f"{func} without a device is on the host"
        elif func in self.COPIES:
            assert func is torch.tensor and isinstance(args[0], int) and device is None, f"{func} is a copy"
        elif func is torch.Tensor.to:
            devices = [x for x in (*args[1:], *keywords.values()) if isinstance(x, str | torch.device)]
            assert not devices, f"to({devices}) may be a copy from the host"
        return func(*args, **keywords)


@contextmanager
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Context in which every call that would wait on a GPU fails."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a tensor was read on the host")

    with monkeypatch.context() as patch, NoWaiting(), NoCopiesFromHost():
        for method in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__"):
            patch.setattr(torch.Tensor, method, refuse)
        yield


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Policy:
    """A policy whose schedule runs under no_waiting, and which computes log-probs as on a GPU."""
    config = model_config(save_model(tmp_path, "qwen2", tied=True), token_budget=64)
    parallel.start(config)
    schedule: Callable[..., Any] = policy_module.get_forward_backward_func()

    def guarded(**arguments: Any) -> Any:
        assert arguments["num_microbatches"] > 1
        with no_waiting(monkeypatch):
            return schedule(**arguments)

    monkeypatch.setattr(policy_module, "get_forward_backward_func", lambda: guarded)
    monkeypatch.setattr(log_probs, "_is_on_host", lambda _: False)
    return Policy(config)


def test_log_probs_and_gradients_never_wait(policy: Policy) -> None:
    rollouts = random_rollouts()
    before = NoWaiting.calls
    policy.log_probs(rollouts, entropies=True)
    policy.accumulate(rollouts, lambda _, values: values.log_probs + values.entropies, entropies=True)
    assert NoWaiting.calls > before + 100, "the schedule ran outside the guard"


@pytest.mark.parametrize(
    "call",
    [
        torch.Tensor.item,
        torch.nonzero,
        lambda x: x[x > 0],
        lambda x: x.sum() > 0 and 1,
        lambda x: x + torch.tensor([1.0]),
        lambda x: x + torch.arange(1),
        lambda x: x.to("cpu"),
    ],
)
def test_the_guard_detects_calls_that_wait(
    call: Callable[[torch.Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AssertionError), no_waiting(monkeypatch):
        call(torch.ones(1))


class CopyCheck(TorchFunctionMode):
    """Asserts that every copy to a device is non-blocking and from page-locked memory, which is a stand-in here."""

    def __init__(self, pinned: list[torch.Tensor]) -> None:
        super().__init__()
        self.pinned, self.count = pinned, 0

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to and isinstance(args[1], torch.device):
            assert any(args[0] is x for x in self.pinned) and kwargs == {"non_blocking": True}
            self.count += 1
        assert func is not torch.Tensor.cpu
        return func(*args, **(kwargs or {}))


def iterate_tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in a tensor, tuple or dataclass, however deep."""
    if isinstance(value, torch.Tensor):
        yield value
    parts = value if isinstance(value, tuple) else vars(value).values() if is_dataclass(value) else ()
    for part in parts:
        yield from iterate_tensors(part)


@pytest.mark.parametrize("context_size", [1, 2])
def test_all_tensors_of_a_micro_batch_are_copied_to_the_device(
    monkeypatch: pytest.MonkeyPatch, context_size: int
) -> None:
    """They include the tensors that attention by SDPA reads. The device is torch's "meta", which has shapes alone."""
    pinned: list[torch.Tensor] = []

    def pin(x: torch.Tensor) -> torch.Tensor:
        pinned.append(x.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    rollouts, padding = random_rollouts(), Padding(sequence=2 * context_size)

    def build(device: str) -> MicroBatch:
        options = {"device": torch.device(device), "context_rank": context_size - 1, "context_size": context_size}
        return build_micro_batch(rollouts, range(8), padding=padding, **options)  # type: ignore[arg-type]

    with CopyCheck(pinned) as copies:
        on_device, on_host = build("meta"), build("cpu")
    actual, expected = list(iterate_tensors(on_device)), list(iterate_tensors(on_host))
    assert [(x.shape, x.dtype) for x in actual] == [(x.shape, x.dtype) for x in expected]
    assert all(x.device.type == "meta" for x in actual) and copies.count == len(pinned) == len(actual)
    assert all(torch.equal(x, y) for x, y in zip(pinned, expected, strict=True))
    assert (on_device.sequences.keys is not None) == (context_size > 1)
    assert any(bucket.gather is not None for bucket in on_device.sequences.buckets) == (context_size == 1)
    assert on_device.sequences.lengths == on_host.sequences.lengths
