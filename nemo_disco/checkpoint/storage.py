"""Writing and reading of megatron's sharded tensors as torch's distributed-checkpoint files.

Writes in this process: megatron's own writer forks processes that outlive a killed rank and hang without psutil.
Reads `.metadata`, a pickle, with an unpickler that admits the classes of a checkpoint alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.serialization import get_default_save_common_strategy
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as megatron_strategy
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.validation import validate_sharding_integrity
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from nemo_disco.checkpoint.metadata import METADATA, read_metadata
from nemo_disco.runtime.collectives import on_every_rank
from nemo_disco.runtime.errors import UserError


def write_shards(
    state: dict[str, Any], directory: Path, group: dist.ProcessGroup, weights_read: Callable[[], None]
) -> None:
    """Write sharded tensors in megatron's torch_dist format. A collective of `group`, which has all ranks.

    Every rank writes and syncs one file, rank 0 also the metadata; data-parallel ranks share the tensors that they all
    have. weights_read is called when this rank has written everything but the moments. Changes the tensors in `state`.

    The steps are those of dist_checkpointing.save under FullyParallelSaveStrategyWrapper, which uses the default group.
    """
    shards, _ = save_preprocess(state, validate_access_integrity=False)
    data_parallel = parallel_state.get_data_parallel_group_gloo(with_context_parallel=True)
    writers = determine_main_replica_uniform_distribution(shards, data_parallel)
    distribute_main_replicas_with_precomputed_distribution(shards, data_parallel, writers)
    shapes = on_every_rank(lambda: [shard.without_data() for shard in nested_values(shards)], group)
    validate_sharding_integrity(shapes)
    tensors, _, _ = megatron_strategy._replace_state_dict_keys_with_sharded_keys(shards, True)
    save(
        megatron_strategy.mcore_to_pyt_state_dict(tensors),
        storage_writer=_Writer(directory, weights_read),
        planner=megatron_strategy.MCoreSavePlanner(flatten_state_dict=False),
        process_group=group,
    )


def write_format_files(directory: Path) -> None:
    """Write the files by which megatron's own tools recognise the format: its name, and an empty common.pt (the common
    state is in checkpoint.json). Call it on one rank."""
    get_default_save_common_strategy().save_common({}, str(directory))
    save_config(CheckpointingConfig("torch_dist"), str(directory))


class _Writer(FileSystemWriter):
    """Writes one tensor at a time; torch's own writer keeps the copies of all tensors until the file is complete."""

    def __init__(self, directory: Path, weights_read: Callable[[], None]) -> None:
        super().__init__(directory)
        self._weights_read = weights_read

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write and sync this rank's file: the live weights first, since training waits for them, then the moments."""
        name = f"{plan.storage_data.prefix}0{filesystem.DEFAULT_SUFFIX}"
        results: list[WriteResult] = []
        with (Path(self.path) / name).open("wb") as file:
            for item in sorted(plan.items, key=_is_moment):
                if _is_moment(item):
                    self._weights_read()
                results.append(self._write(item, planner.resolve_data(item), file, name))
            self._weights_read()
            file.flush()
            os.fsync(file.fileno())
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write(self, item: WriteItem, data: Any, file: Any, name: str) -> WriteResult:
        """Write one tensor. Raises the OSError of the disk, which torch's zip writer hides in a RuntimeError."""
        if isinstance(data, Tensor):
            data = data.detach().cpu()
            if data.untyped_storage().size() != data.nbytes:
                data = data.clone()  # torch.save writes a tensor's whole storage
        try:
            return filesystem._write_item(self.transforms, file, data, item, name, self.serialization_format)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise

    def storage_meta(self) -> None:
        """None: a checkpoint may be moved, so that its path and time of writing are not recorded."""


def _is_moment(item: WriteItem) -> bool:
    return item.index.fqn.startswith("optimizer.state.exp_avg")


class LoadStrategy(megatron_strategy.TorchDistLoadShardedStrategy):  # type: ignore[misc]
    """megatron's strategy with MetadataReader in place of a reader that unpickles any class."""

    def __init__(self, reader: MetadataReader) -> None:
        super().__init__()
        self._reader = reader

    def load(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> Any:
        original = megatron_strategy._get_filesystem_reader
        megatron_strategy._get_filesystem_reader = lambda *_args, **_kwargs: self._reader
        try:
            return super().load(sharded_state_dict, checkpoint_dir)
        finally:
            megatron_strategy._get_filesystem_reader = original


class NoCommonState(TorchCommonLoadStrategy):  # type: ignore[misc]
    """Strategy that does not open common.pt, a pickle: the common state is in checkpoint.json."""

    def load_common(self, _checkpoint_dir: str | Path) -> dict[str, Any]:
        return {}


class MetadataReader(FileSystemReader):
    """Reads tensors (torch opens them with weights_only) of the `files` of one checkpoint, and no other file."""

    def __init__(self, path: Path, files: Collection[str]) -> None:
        """Raises UserError if the metadata names a class that no checkpoint needs, or a file that is not in `files`."""
        super().__init__(path)
        self._metadata = read_metadata(path / METADATA)
        elsewhere = {info.relative_path for info in self._metadata.storage_data.values()} - set(files)
        if elsewhere:
            raise UserError(f"{path / METADATA} points at {min(elsewhere)!r}, which is not part of the checkpoint")

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        return self._metadata
