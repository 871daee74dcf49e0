"""`.metadata` of a torch distributed checkpoint: a pickle, opened by a list of classes alone. Not megatron's business.

The one unpickler of the program: what this program wrote is opened by a short list, what others wrote by a longer one.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from nemo_disco.runtime.errors import UserError

METADATA = ".metadata"
# BytesStorageMetadata is left out on purpose: what it announces, torch unpickles without restriction.
_OURS = {
    ("torch", "Size"),
    ("torch", "bfloat16"),
    ("torch", "float32"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
}
_NOT_OURS = "which no checkpoint of ours holds: it was not written by this program and is not opened"


def read_metadata(file: Path, admitted: Collection[tuple[str, str]] = _OURS, refusal: str = _NOT_OURS) -> Metadata:
    """The metadata of a torch distributed checkpoint. Raises UserError if it is damaged, or asks for anything else.

    admitted: (module, name) of what the pickle may ask for; by default what this program writes. refusal: why the rest
    is not opened.
    """
    try:
        metadata = _Unpickler(file, admitted, refusal).load()
    except (OSError, pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError):
        raise UserError(f"{file}: damaged, not the metadata of a checkpoint") from None
    if type(metadata) is not Metadata or not isinstance(metadata.storage_data, dict):
        raise UserError(f"{file}: not the metadata of a checkpoint")
    return metadata


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Path, admitted: Collection[tuple[str, str]], refusal: str) -> None:
        super().__init__(io.BytesIO(file.read_bytes()))
        self._file, self._admitted, self._refusal = file, admitted, refusal

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._admitted:
            raise UserError(f"{self._file} asks for {module}.{name}, {self._refusal}")
        return super().find_class(module, name)
