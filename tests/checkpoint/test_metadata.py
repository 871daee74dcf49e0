"""A damaged or foreign `.metadata` is refused with a one-line message and without taking much memory."""

from __future__ import annotations

import contextlib
import pickle
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from nemo_disco.checkpoint.metadata import read_metadata
from nemo_disco.conversion.torch_dist import _ADMITTED
from nemo_disco.runtime.errors import UserError


def pickle_metadata(protocol: int) -> bytes:
    """The content of an intact `.metadata` file: 40 tensors of two chunks each."""
    size = torch.Size([4, 3])
    chunks = [ChunkStorageMetadata(torch.Size([2 * i, 0]), torch.Size([2, 3])) for i in range(2)]
    tensors = {f"t{i}": TensorStorageMetadata(TensorProperties(dtype=torch.float32), size, chunks) for i in range(40)}
    locations = {
        MetadataIndex(name, chunk.offsets, i): _StorageInfo("__0_0.distcp", 100 * i, 100)
        for name in tensors
        for i, chunk in enumerate(chunks)
    }
    return pickle.dumps(Metadata(state_dict_metadata=tensors, storage_data=locations), protocol)


INTACT = {protocol: pickle_metadata(protocol) for protocol in (2, 4)}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("metadata") / ".metadata"


@pytest.mark.parametrize("protocol", INTACT)
def test_intact_metadata_is_read(file: Path, protocol: int) -> None:
    file.write_bytes(INTACT[protocol])
    assert len(read_metadata(file).state_dict_metadata) == 40


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02K\x01r\xff\xff\xff\x7f.",  # LONG_BINPUT 2**31 - 1: a memo of 32 GB
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00a.",  # BINBYTES8 of a terabyte
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\x00\x00\x00a.",  # BINUNICODE8
        b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00a.",  # BYTEARRAY8
        b"\x80\x04\x95\xff\xff\xff\xff\xff\x00\x00\x00K\x01.",  # FRAME
    ],
)
def test_a_length_beyond_the_files_size_is_refused_before_allocating(file: Path, pickled: bytes) -> None:
    file.write_bytes(pickled)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="damaged"):
        read_metadata(file)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # kilobytes
    assert growth < 64 << 10, "reading the file took 64 MB or more"


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02}K\x01" + b"\x85" * 100_000 + b"K\x02s.",  # a dict's key, whose hash would overflow the stack
        b"\x80\x02}(" + b"(" * 100_000 + b"K\x01" + b"t" * 100_000 + b"K\x02u.",
        b"\x80\x02}K\x01" + b"".join(b"\x85q\x000h\x00" for _ in range(1000)) + b"K\x02s.",  # nested through the memo
    ],
)
def test_deeply_nested_tuples_are_refused(file: Path, pickled: bytes) -> None:
    file.write_bytes(pickled)
    with pytest.raises(UserError, match=r"damaged.*nested more than 100 deep"):
        read_metadata(file)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_altered_bytes_are_read_or_refused(file: Path, data: st.DataObject) -> None:
    content = bytearray(INTACT[data.draw(st.sampled_from([2, 4]))])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    for admitted in (_ADMITTED, set()):
        with contextlib.suppress(UserError):
            read_metadata(file, admitted, "which is not opened")
