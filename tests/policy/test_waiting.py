"""Between a step's micro-batches the program never reads a value of a tensor: on a GPU it would wait for all its work.

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
    calls = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITING, f"{func} would wait for the device"
        if name in ("index", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), f"{func} with a mask would wait"
        NoWaiting.calls += 1
        return func(*args, **(kwargs or {}))


class NothingFromTheHost(TorchFunctionMode):
    """Forbids copies of tensors from the host, for which CUDA waits if memory is not page-locked. As a CPU's tensors
    are all on one device, the functions that would copy are refused by name; a single number on the host is allowed."""

    MAKERS = (torch.zeros, torch.ones, torch.full, torch.empty, torch.arange)
    COPIES = (torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.cuda)

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        device = given.get("device")
        if func in self.MAKERS:
            assert device is not None, f"{func} without a device is on the host"
        elif func in self.COPIES:
            assert func is torch.tensor and isinstance(args[0], int) and device is None, f"{func} is a copy"
        elif func is torch.Tensor.to:
            named = [x for x in (*args[1:], *given.values()) if isinstance(x, str | torch.device)]
            assert not named, f"to({named}) may be a copy from the host"
        return func(*args, **given)


@contextmanager
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a tensor was read on the host")

    with monkeypatch.context() as patch, NoWaiting(), NothingFromTheHost():
        for method in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__"):
            patch.setattr(torch.Tensor, method, refuse)
        yield


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Policy:
    """A policy whose schedule runs under no_waiting, and whose log-probs take the path of a GPU."""
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
    policy.accumulate(rollouts, lambda _, log_probs, entropy: log_probs + entropy, entropies=True)
    assert NoWaiting.calls > before + 100, "the schedule ran outside the guard"


@pytest.mark.parametrize(
    "ask",
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
def test_the_guard_detects_calls_that_wait(ask: Callable[[torch.Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError), no_waiting(monkeypatch):
        ask(torch.ones(1))


class Copies(TorchFunctionMode):
    """Asserts that every copy to another device is from page-locked memory (a stand-in) and non-blocking."""

    def __init__(self, pinned: list[torch.Tensor]) -> None:
        super().__init__()
        self.pinned, self.count = pinned, 0

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to and isinstance(args[1], torch.device):
            assert any(args[0] is x for x in self.pinned) and kwargs == {"non_blocking": True}
            self.count += 1
        assert func is not torch.Tensor.cpu
        return func(*args, **(kwargs or {}))


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    parts = value if isinstance(value, tuple) else vars(value).values() if is_dataclass(value) else ()
    for part in parts:
        yield from tensors(part)


@pytest.mark.parametrize("context_size", [1, 2])
def test_all_tensors_of_a_micro_batch_are_copied_to_the_device(
    monkeypatch: pytest.MonkeyPatch, context_size: int
) -> None:
    """Those that attention by SDPA reads too. The device is torch's "meta", which has shapes and no numbers."""
    pinned: list[torch.Tensor] = []

    def pin(x: torch.Tensor) -> torch.Tensor:
        pinned.append(x.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    rollouts, layout = random_rollouts(), Padding(sequence=2 * context_size)

    def build(device: str) -> MicroBatch:
        of = {"device": torch.device(device), "context_rank": context_size - 1, "context_size": context_size}
        return build_micro_batch(rollouts, range(8), layout=layout, **of)  # type: ignore[arg-type]

    with Copies(pinned) as copies:
        on_device, on_host = build("meta"), build("cpu")
    copied, expected = list(tensors(on_device)), list(tensors(on_host))
    assert [(x.shape, x.dtype) for x in copied] == [(x.shape, x.dtype) for x in expected]
    assert all(x.device.type == "meta" for x in copied) and copies.count == len(pinned) == len(copied)
    assert all(torch.equal(x, y) for x, y in zip(pinned, expected, strict=True))
    assert (on_device.sequences.keys is not None) == (context_size > 1)
    assert any(bucket.gather is not None for bucket in on_device.sequences.buckets) == (context_size == 1)
    assert on_device.sequences.lengths == on_host.sequences.lengths
