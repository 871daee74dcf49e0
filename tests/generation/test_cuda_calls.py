"""The arguments that cuda.py passes to C libraries, and the ranks of the engines that call it. No GPU is needed: C
functions with the prototypes of CUDA 13.0's cuda_runtime_api.h and NCCL 2.32's nccl.h replace libcudart and libnccl."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from ctypes import POINTER, c_char, c_int, c_size_t, c_uint, c_void_p
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_disco.generation.worker.rollout_worker import cuda, tensorrt_llm, vllm
from nemo_disco.generation.worker.rollout_worker.cuda import Broadcast, IpcMemory
from nemo_disco.generation.worker.rollout_worker.tensorrt_llm import WorkerEngine
from nemo_disco.generation.worker.rollout_worker.tensors import Assembly, checksum

CPU = torch.device("cpu")
STREAM = 0x5EA  # the current stream of the fake torch.cuda
HANDLE, UNIQUE_ID = bytes(range(64)), bytes(range(1, 129))  # the handle has a zero byte, which would end a C string


class IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", c_char * 64),)


class UniqueId(ctypes.Structure):
    _fields_ = (("internal", c_char * 128),)


PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cudaMalloc": (POINTER(c_void_p), c_size_t),
    "cudaIpcGetMemHandle": (POINTER(IpcHandle), c_void_p),
    "cudaIpcOpenMemHandle": (POINTER(c_void_p), IpcHandle, c_uint),
    "cudaIpcCloseMemHandle": (c_void_p,),
    "ncclGetUniqueId": (POINTER(UniqueId),),
    "ncclCommInitRank": (POINTER(c_void_p), c_int, UniqueId, c_int),
    # sendbuff, recvbuff, count, datatype, root, comm, stream
    "ncclBroadcast": (c_void_p, c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p),
    "ncclCommAbort": (c_void_p,),
}
ADDRESS = 0x7F11_0000_5678  # the pointer that the functions return; it does not fit into an int


class Libraries:
    """Fakes of libcudart and libnccl. calls: each call's name and arguments. codes: nonzero return codes by name."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.codes: dict[str, int] = {}
        self.functions = []  # ctypes does not keep them alive
        for name, types in PROTOTYPES.items():
            function = ctypes.CFUNCTYPE(c_int, *types)(self._recorder(name))
            self.functions.append(function)
            # cuda.py must call it like a library's function, by its address and without a prototype.
            setattr(self, name, ctypes.CFUNCTYPE(c_int)(ctypes.cast(function, c_void_p).value))

    def _recorder(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            values = []
            for argument in arguments:
                if isinstance(argument, ctypes.Structure):
                    values.append(bytes(argument))
                elif isinstance(argument, ctypes._Pointer):
                    self._fill(argument)
                else:
                    values.append(argument)
            self.calls.append((name, *values))
            return self.codes.get(name, 0)

        return call

    @staticmethod
    def _fill(out: Any) -> None:
        """Write an output argument, as the C function does."""
        if out._type_ is c_void_p:
            out[0] = ADDRESS
        else:
            ctypes.memmove(out, UNIQUE_ID if out._type_ is UniqueId else HANDLE, ctypes.sizeof(out._type_))


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Libraries:
    """Fake libraries, which cuda.py calls during the test, and a fake torch.cuda with GPUs 0 and 1."""
    fakes = Libraries()

    @contextlib.contextmanager
    def device(index: Any) -> Iterator[None]:
        fakes.calls.append(("device", index))
        yield

    stream = SimpleNamespace(cuda_stream=STREAM, synchronize=lambda: fakes.calls.append(("synchronize",)))
    monkeypatch.setattr(cuda, "_library", lambda _name: fakes)
    monkeypatch.setattr(cuda, "_as_tensor", lambda _pointer, size: torch.zeros(size, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"GPU-{i}"))
    return fakes


def test_memory_is_shared_by_its_handle(libraries: Libraries) -> None:
    memory = IpcMemory.allocate(4096, 1)
    assert memory.handle == HANDLE
    assert libraries.calls == [("device", 1), ("cudaMalloc", 4096), ("cudaIpcGetMemHandle", ADDRESS)]
    libraries.calls.clear()
    opened = IpcMemory.open({"uuid": "GPU-1", "handle": HANDLE.hex(), "size": 4096})
    assert libraries.calls == [("device", 1), ("cudaIpcOpenMemHandle", HANDLE, 1)]
    libraries.calls.clear()
    opened.close()
    assert libraries.calls == [("device", CPU), ("cudaIpcCloseMemHandle", opened.tensor.data_ptr())]


def test_a_gpu_that_this_process_does_not_see_is_named(libraries: Libraries) -> None:
    with pytest.raises(RuntimeError, match="the engine's GPU GPU-7 is not among those of this process"):
        IpcMemory.open({"uuid": "GPU-7", "handle": HANDLE.hex(), "size": 1})
    assert not libraries.calls


def test_a_broadcast_sends_bytes_from_rank_0(libraries: Libraries) -> None:
    unique_id = Broadcast.make_id()
    assert unique_id == UNIQUE_ID
    libraries.calls.clear()
    broadcast, memory = Broadcast(unique_id, 1, 3, CPU), torch.zeros(4096, dtype=torch.uint8)
    broadcast(memory[1024:])
    broadcast.abort()
    address, uint8 = memory.data_ptr() + 1024, 1
    assert libraries.calls == [
        ("device", CPU),
        ("ncclCommInitRank", 3, UNIQUE_ID, 1),
        ("ncclBroadcast", address, address, 3072, uint8, 0, ADDRESS, STREAM),
        ("synchronize",),
        ("ncclCommAbort", ADDRESS),
    ]


def test_a_function_that_fails_raises_an_error_with_its_name(libraries: Libraries) -> None:
    broadcast = Broadcast(UNIQUE_ID, 0, 2, CPU)
    libraries.codes = {"ncclBroadcast": 6, "cudaMalloc": 2}
    with pytest.raises(RuntimeError, match="ncclBroadcast failed with code 6"):
        broadcast(torch.zeros(8, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="cudaMalloc failed with code 2"):
        IpcMemory.allocate(8, 0)


@pytest.mark.usefixtures("libraries")
def test_each_rank_of_vllm_joins_as_itself_and_receives_before_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def broadcast(unique_id: bytes, rank: int, size: int, device: torch.device) -> Any:
        assert (unique_id, rank, size, device) == (UNIQUE_ID, worker.rank + 1, 3, CPU)
        return lambda memory: memory.copy_(torch.arange(8))

    monkeypatch.setattr(vllm, "Broadcast", broadcast)
    for rank in (0, 1):
        worker = SimpleNamespace(rank=rank, device=CPU, refit_assembly=Assembly(), refit_waiting=[])
        assert vllm._vllm_open(worker, "", (2, 8), True) == {}
        vllm._vllm_join(worker, UNIQUE_ID, 3)
        vllm._vllm_receive(worker, 1)
        checksums = vllm._vllm_load(worker, 1, [("name", "uint8", [5], 2, 0, 5)])
        assert checksums == {"name": checksum(torch.arange(2, 7).byte())}
        assert worker.refit_waiting[0][1].tolist() == [2, 3, 4, 5, 6]


@pytest.mark.usefixtures("libraries")
def test_a_colocated_rank_of_vllm_allocates_on_its_own_gpu() -> None:
    worker = SimpleNamespace(device=torch.device("cuda:1"))
    assert vllm._vllm_open(worker, "", (2, 8), False)["handle"] == HANDLE.hex()
    assert worker.refit_slots.shape == (2, 8)


def test_tensorrt_llm_joins_as_the_only_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, calls = object.__new__(WorkerEngine), []

    def broadcast(*arguments: Any) -> Any:
        calls.append(arguments)
        return lambda memory: calls.append(memory.tolist())

    monkeypatch.setattr(tensorrt_llm, "Broadcast", broadcast)
    engine.slots, engine.broadcast = torch.arange(4).view(2, 2), None
    engine.receive(0)
    engine.join(UNIQUE_ID, 2)
    engine.receive(1)
    assert calls == [(UNIQUE_ID, 1, 2, CPU), [2, 3]]
