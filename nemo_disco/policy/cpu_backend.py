"""Makes megatron-core 0.16 run without CUDA, over gloo. Does nothing where CUDA is available.

megatron-core names the GPU in a few dozen places (tensor factories, streams, RNG state, a type string). `enable`
replaces each by its CPU counterpart; nothing numerical is replaced. Call it once, before a model is built.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist

# The modules whose calls of tensor factories pass device="cuda" or pin_memory=True.
_CUDA_LITERALS = (
    "utils",
    "transformer.utils",
    "pipeline_parallel.schedules",
    "models.common.embeddings.rope_utils",
    "optimizer.optimizer",
    "optimizer.clip_grads",
    "optimizer.grad_scaler",
    "optimizer.distrib_optimizer",
)
_FACTORIES = frozenset({"zeros", "ones", "empty", "tensor", "full", "arange", "empty_like"})
# Variable -> mallopt's option, bytes: larger blocks are mapped separately; more free memory at the heap's end is freed.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": (-3, 1 << 20), "MALLOC_TRIM_THRESHOLD_": (-1, 8 << 20)}
_LARGE = 256 << 20  # bytes of weights
_enabled = False


class _CpuTorch:
    """Replacement of the name `torch` in a megatron module: the same torch, whose factories make tensors on the CPU."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name not in _FACTORIES:
            return value

        def factory(*args: Any, **kwargs: Any) -> Any:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = "cpu"
            kwargs.pop("pin_memory", None)
            return value(*args, **kwargs)

        return factory


def enable() -> None:
    """Make megatron-core run on the CPU of this process; does nothing where CUDA is available."""
    global _enabled
    if _enabled or torch.cuda.is_available():
        return
    _enabled = True
    _replace_cuda_calls()
    for module in _CUDA_LITERALS:
        importlib.import_module(f"megatron.core.{module}").torch = _CpuTorch()  # type: ignore[attr-defined]
    _use_cpu_random_state()
    _exchange_unequal_shares()


def return_freed_memory(weight_bytes: int) -> None:
    """Make the allocator return freed tensors of 1 MiB and more to the system at once, on a CPU with at least 256 MiB
    of weights.

    By default glibc keeps freed blocks below 32 MiB wherever something newer lies above them: about a fifth of the
    memory that `plan` reports (tests/policy/test_cpu_memory.py compares a run with it). Mapping costs about a tenth of
    the time at 135M parameters and a fifth at 4M (benchmarks/train_step.py, with _LARGE = 0), so small models keep the
    default. Does nothing with another C library, or if one of _ALLOCATOR's variables is set.
    """
    if not _enabled or weight_bytes < _LARGE or any(name in os.environ for name in _ALLOCATOR):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, size in _ALLOCATOR.values():
            mallopt(option, size)


def _replace_cuda_calls() -> None:
    """Replace torch.cuda's queries, Tensor.cuda and Tensor.type by functions for the CPU that megatron-core accepts."""
    cuda: Any = torch.cuda
    cpu = torch.device("cpu")
    cuda.current_device = lambda: cpu
    cuda.synchronize = lambda *_args, **_kwargs: None
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_args, **_kwargs: self  # tied embeddings under PP, slicing under CP
    cuda.Stream = _NoStream  # a class: other libraries name it in annotations
    cuda.current_stream = lambda *_args, **_kwargs: _NoStream()
    cuda.stream = lambda *_: nullcontext()
    # The dispatcher of experts makes lists of its counts only when it copies them from a GPU.
    dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher.maybe_move_tensor_to_cpu = _to_host

    type_of = torch.Tensor.type

    def cuda_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        # The optimizers accept only parameters whose type() is a CUDA type, such as 'torch.cuda.FloatTensor'.
        if dtype is None:
            return str(type_of(self)).replace("torch.", "torch.cuda.", 1)
        return type_of(self, dtype, *args, **kwargs)

    tensor.type = cuda_type


class _NoStream:
    """A CPU has no streams: there is nothing to wait for."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def wait_stream(self, _stream: Any) -> None:
        pass

    def wait_event(self, _event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self, _event: Any = None) -> _NoStream:
        return self


def _to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:  # noqa: ARG001
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _exchange_unequal_shares() -> None:
    """Replace megatron-core's gather and reduce-scatter of shares of unequal sizes, as those of tokens for experts are,
    which gloo refuses."""
    mappings: Any = importlib.import_module("megatron.core.tensor_parallel.mappings")
    gather_equal, scatter_equal = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(x: torch.Tensor, group: Any, sizes: list[int] | None = None, *rest: Any) -> Any:
        if group.size() == 1 or sizes is None or len(set(sizes)) == 1:
            return gather_equal(x, group, sizes, *rest)
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        shares = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(shares, padded, group=group)
        return torch.cat([share[:size] for share, size in zip(shares, sizes, strict=True)])

    def scatter(x: torch.Tensor, group: Any, sizes: list[int] | None = None, *rest: Any) -> Any:
        if group.size() == 1 or sizes is None:
            return scatter_equal(x, group, sizes, *rest)
        total = x.clone()
        dist.all_reduce(total, group=group)
        return torch.split(total, sizes)[group.rank()].clone()

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather, scatter


def _use_cpu_random_state() -> None:
    """Let activation recomputation save and restore the CPU's RNG state; as dropout is 0, one state is enough."""
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    random._get_cuda_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)
