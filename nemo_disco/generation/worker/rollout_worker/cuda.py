"""GPU staging memory that another process can write (CUDA IPC), and NCCL broadcasts to engines on other machines.

Calls the CUDA runtime and NCCL by ctypes: torch's own handles differ between its versions, and run and worker have
different versions. Not yet run on a GPU.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LAZY_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess
_NCCL_UINT8 = 1  # ncclUint8


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * 64),)  # cudaIpcMemHandle_t


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_char * 128),)  # ncclUniqueId


def _library(name: str) -> Any:
    """A library that torch has already loaded into this process."""
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if f"/lib{name}.so" in line}
    return ctypes.CDLL(min(paths) if paths else f"lib{name}.so")


def _check(code: int, function: str) -> None:
    if code:
        raise RuntimeError(f"{function} failed with code {code}")


@dataclass(frozen=True)
class IpcMemory:
    """Memory on a GPU as a uint8 tensor [size], allocated here or opened by another process's handle."""

    tensor: Tensor
    handle: bytes

    @classmethod
    def allocate(cls, size: int, device: int) -> IpcMemory:
        """Allocate `size` bytes outside torch's allocator, whose handles other versions of torch cannot open."""
        cudart, pointer, handle = _library("cudart"), ctypes.c_void_p(), _IpcHandle()
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # creates the context
            _check(cudart.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(size)), "cudaMalloc")
            _check(cudart.cudaIpcGetMemHandle(ctypes.byref(handle), pointer), "cudaIpcGetMemHandle")
            return cls(_as_tensor(pointer, size), bytes(handle))

    @classmethod
    def open(cls, description: dict[str, Any]) -> IpcMemory:
        """Open another process's memory, in the run. description: the result of `describe` in that process."""
        cudart, pointer = _library("cudart"), ctypes.c_void_p()
        handle = bytes.fromhex(description["handle"])
        with torch.cuda.device(_device(description["uuid"])):
            code = cudart.cudaIpcOpenMemHandle(
                ctypes.byref(pointer), _IpcHandle.from_buffer_copy(handle), ctypes.c_uint(_LAZY_PEER_ACCESS)
            )
            _check(code, "cudaIpcOpenMemHandle")
            return cls(_as_tensor(pointer, description["size"]), handle)

    def close(self) -> None:
        """Close memory that `open` opened, in the run; `tensor` must not be used afterwards."""
        with torch.cuda.device(self.tensor.device):
            pointer = ctypes.c_void_p(self.tensor.data_ptr())
            _check(_library("cudart").cudaIpcCloseMemHandle(pointer), "cudaIpcCloseMemHandle")

    def describe(self) -> dict[str, Any]:
        """The description for `open` in another process, in JSON's types."""
        uuid = str(torch.cuda.get_device_properties(self.tensor.device).uuid)
        return {"uuid": uuid, "handle": self.handle.hex(), "size": self.tensor.numel()}


def _device(uuid: str) -> int:
    """The index in this process of the GPU with this uuid."""
    for i in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(i).uuid) == uuid:
            return i
    raise RuntimeError(f"the engine's GPU {uuid} is not among those of this process")


def _as_tensor(pointer: ctypes.c_void_p, size: int) -> Tensor:
    class Raw:
        __cuda_array_interface__ = {  # noqa: RUF012 - read once, below
            "shape": (size,),
            "typestr": "|u1",
            "data": (pointer.value, False),
            "version": 3,
        }

    return torch.as_tensor(Raw(), device="cuda")


class Broadcast:
    """NCCL broadcast of bytes from the run (rank 0) to an engine's ranks, with a communicator of its own."""

    def __init__(self, unique_id: bytes, rank: int, size: int, device: torch.device) -> None:
        """Join. Returns when all ranks have joined, and never if one does not. unique_id: by `make_id` on rank 0."""
        self._nccl, self._communicator = _library("nccl"), ctypes.c_void_p()
        with torch.cuda.device(device):
            code = self._nccl.ncclCommInitRank(
                ctypes.byref(self._communicator), size, _UniqueId.from_buffer_copy(unique_id), rank
            )
        _check(code, "ncclCommInitRank")

    @staticmethod
    def make_id() -> bytes:
        """Make the id of a new communicator, on rank 0."""
        unique_id = _UniqueId()
        _check(_library("nccl").ncclGetUniqueId(ctypes.byref(unique_id)), "ncclGetUniqueId")
        return bytes(unique_id)

    def __call__(self, memory: Tensor) -> None:
        """Copy rank 0's bytes into every rank's memory. Returns when they have arrived, and never if a rank is gone."""
        stream = torch.cuda.current_stream(memory.device)
        pointer, count = ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.numel())
        code = self._nccl.ncclBroadcast(
            pointer, pointer, count, _NCCL_UINT8, 0, self._communicator, ctypes.c_void_p(stream.cuda_stream)
        )
        _check(code, "ncclBroadcast")
        stream.synchronize()

    def abort(self) -> None:
        """Stop a broadcast in another thread of this process, and free the communicator."""
        _check(self._nccl.ncclCommAbort(self._communicator), "ncclCommAbort")
