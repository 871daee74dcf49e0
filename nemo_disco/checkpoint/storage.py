"""megatron's sharded tensors to and from torch's distributed-checkpoint files.

Writes in this process (megatron's own writer forks helpers that outlive a killed rank, and hang without psutil).
Reads `.metadata`, a pickle, through an unpickler that admits the classes of a checkpoint alone.
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
from nemo_disco.runtime.errors import UserError


def write_shards(
    state: dict[str, Any], directory: Path, group: dist.ProcessGroup, weights_read: Callable[[], None]
) -> None:
    """megatron's torch_dist format: every rank writes its shards to one file and syncs it, rank 0 the metadata. What
    data-parallel ranks have in common is spread over them. group: of all ranks. A collective; takes `state` apart.

    weights_read is called once this rank has written all but the moments.

    The steps of dist_checkpointing.save under FullyParallelSaveStrategyWrapper, which speak over the default group.
    """
    shards, _ = save_preprocess(state, validate_access_integrity=False)
    sharers = parallel_state.get_data_parallel_group_gloo(with_context_parallel=True)
    shares = determine_main_replica_uniform_distribution(shards, sharers)
    distribute_main_replicas_with_precomputed_distribution(shards, sharers, shares)
    places: list[Any] = [None] * group.size()
    dist.all_gather_object(places, [shard.without_data() for shard in nested_values(shards)], group)
    validate_sharding_integrity(places)
    tensors, _, _ = megatron_strategy._replace_state_dict_keys_with_sharded_keys(shards, True)
    save(
        megatron_strategy.mcore_to_pyt_state_dict(tensors),
        storage_writer=_Writer(directory, weights_read),
        planner=megatron_strategy.MCoreSavePlanner(flatten_state_dict=False),
        process_group=group,
    )


def write_marks(directory: Path) -> None:
    """What megatron's own tools look for: the format's name, and common.pt, empty as checkpoint.json has what ranks
    have in common. For one rank."""
    get_default_save_common_strategy().save_common({}, str(directory))
    save_config(CheckpointingConfig("torch_dist"), str(directory))


class _Writer(FileSystemWriter):
    """Writes a tensor at a time: torch's own keeps every copy that it makes until the end of the file."""

    def __init__(self, directory: Path, weights_read: Callable[[], None]) -> None:
        super().__init__(directory)
        self._weights_read = weights_read

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """This rank's file, synced: live weights before the moments, which are copies."""
        name = f"{plan.storage_data.prefix}0{filesystem.DEFAULT_SUFFIX}"
        results: list[WriteResult] = []
        with (Path(self.path) / name).open("wb") as file:
            for item in sorted(plan.items, key=_is_moment):
                if _is_moment(item):
                    self._weights_read()
                results.append(self._written(item, planner.resolve_data(item), file, name))
            self._weights_read()
            file.flush()
            os.fsync(file.fileno())
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _written(self, item: WriteItem, data: Any, file: Any, name: str) -> WriteResult:
        """Raises what the disk said: torch's zip writer complains of it in words of its own."""
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
        """Nothing of where and when it was written: a checkpoint may be moved."""


def _is_moment(item: WriteItem) -> bool:
    return item.index.fqn.startswith("optimizer.state.exp_avg")


class LoadStrategy(megatron_strategy.TorchDistLoadShardedStrategy):  # type: ignore[misc]
    """megatron's own, with MetadataReader in place of the reader that unpickles freely."""

    def __init__(self, reader: MetadataReader) -> None:
        super().__init__()
        self._reader = reader

    def load(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> Any:
        theirs = megatron_strategy._get_filesystem_reader
        megatron_strategy._get_filesystem_reader = lambda *_args, **_kwargs: self._reader
        try:
            return super().load(sharded_state_dict, checkpoint_dir)
        finally:
            megatron_strategy._get_filesystem_reader = theirs


class NothingCommon(TorchCommonLoadStrategy):  # type: ignore[misc]
    """Leaves common.pt, a pickle, closed: what ranks have in common is in checkpoint.json."""

    def load_common(self, _checkpoint_dir: str | Path) -> dict[str, Any]:
        return {}


class MetadataReader(FileSystemReader):
    """Reads tensors (torch opens them with weights_only) of the `files` of one checkpoint, and no other file."""

    def __init__(self, path: Path, files: Collection[str]) -> None:
        """Raises UserError if the metadata holds anything but a checkpoint's own classes, or points elsewhere."""
        super().__init__(path)
        self._metadata = read_metadata(path / METADATA)
        elsewhere = {info.relative_path for info in self._metadata.storage_data.values()} - set(files)
        if elsewhere:
            raise UserError(f"{path / METADATA} points at {min(elsewhere)!r}, which is not part of the checkpoint")

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        return self._metadata
