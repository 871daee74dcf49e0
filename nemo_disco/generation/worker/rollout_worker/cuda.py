"""Staging memory on a GPU that another process can write (CUDA IPC), and NCCL between the run and an engine elsewhere.

Through the CUDA runtime and NCCL themselves, by ctypes: torch's own handles differ between its versions, and the two
sides have different ones. Not run: nothing here has seen a GPU.
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
    """A library that torch has loaded already, found in this process."""
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if f"/lib{name}.so" in line}
    return ctypes.CDLL(min(paths) if paths else f"lib{name}.so")


def _check(code: int, what: str) -> None:
    if code:
        raise RuntimeError(f"{what} failed with code {code}")


@dataclass(frozen=True)
class IpcMemory:
    """Bytes on a GPU as a tensor [size] of uint8, here allocated or opened from another process's handle."""

    tensor: Tensor
    handle: bytes

    @classmethod
    def allocate(cls, size: int, device: int) -> IpcMemory:
        """Outside torch's allocator, whose handles other versions of torch cannot open."""
        cudart, pointer, handle = _library("cudart"), ctypes.c_void_p(), _IpcHandle()
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # the context is there
            _check(cudart.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(size)), "cudaMalloc")
            _check(cudart.cudaIpcGetMemHandle(ctypes.byref(handle), pointer), "cudaIpcGetMemHandle")
            return cls(_as_tensor(pointer, size), bytes(handle))

    @classmethod
    def open(cls, described: dict[str, Any]) -> IpcMemory:
        """In the run: another process's memory, from what its `described` said."""
        cudart, pointer = _library("cudart"), ctypes.c_void_p()
        handle = bytes.fromhex(described["handle"])
        with torch.cuda.device(_device(described["uuid"])):
            opened = cudart.cudaIpcOpenMemHandle(
                ctypes.byref(pointer), _IpcHandle.from_buffer_copy(handle), ctypes.c_uint(_LAZY_PEER_ACCESS)
            )
            _check(opened, "cudaIpcOpenMemHandle")
            return cls(_as_tensor(pointer, described["size"]), handle)

    def close(self) -> None:
        """In the run, of an opened one: `tensor` must not be used afterwards."""
        with torch.cuda.device(self.tensor.device):
            pointer = ctypes.c_void_p(self.tensor.data_ptr())
            _check(_library("cudart").cudaIpcCloseMemHandle(pointer), "cudaIpcCloseMemHandle")

    def described(self) -> dict[str, Any]:
        """What the other side needs to open it, as JSON."""
        uuid = str(torch.cuda.get_device_properties(self.tensor.device).uuid)
        return {"uuid": uuid, "handle": self.handle.hex(), "size": self.tensor.numel()}


def _device(uuid: str) -> int:
    """This process's number of a GPU."""
    found = [i for i in range(torch.cuda.device_count()) if str(torch.cuda.get_device_properties(i).uuid) == uuid]
    if not found:
        raise RuntimeError(f"the engine's GPU {uuid} is not among those of this process")
    return found[0]


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
    """NCCL from the run (rank 0) to an engine's ranks: one communicator, of bytes alone."""

    def __init__(self, unique_id: bytes, rank: int, size: int, device: torch.device) -> None:
        """Returns when all have joined, and never if one does not. unique_id: of `make_id`, by the run."""
        self._nccl, self._communicator = _library("nccl"), ctypes.c_void_p()
        with torch.cuda.device(device):
            joined = self._nccl.ncclCommInitRank(
                ctypes.byref(self._communicator), size, _UniqueId.from_buffer_copy(unique_id), rank
            )
        _check(joined, "ncclCommInitRank")

    @staticmethod
    def make_id() -> bytes:
        found = _UniqueId()
        _check(_library("nccl").ncclGetUniqueId(ctypes.byref(found)), "ncclGetUniqueId")
        return bytes(found)

    def __call__(self, memory: Tensor) -> None:
        """Rank 0's bytes into everyone's; returns when they are there, and never if a rank is gone."""
        stream = torch.cuda.current_stream(memory.device)
        pointer, count = ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.numel())
        sent = self._nccl.ncclBroadcast(
            pointer, pointer, count, _NCCL_UINT8, 0, self._communicator, ctypes.c_void_p(stream.cuda_stream)
        )
        _check(sent, "ncclBroadcast")
        stream.synchronize()

    def abort(self) -> None:
        """Break off what is under way, in another thread of this process, and give the communicator back."""
        _check(self._nccl.ncclCommAbort(self._communicator), "ncclCommAbort")
