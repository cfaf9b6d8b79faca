"""From a data configuration to batches: the interface of all readers, and which of them reads what."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Int64

from vaetrain.data.config import DataConfig
from vaetrain.data.format.manifest import Manifest
from vaetrain.data.readers.batch import Batch
from vaetrain.data.readers.choose import choose_reader
from vaetrain.data.readers.decoded import DecodedReader
from vaetrain.data.readers.decoded_file import decoded_folder
from vaetrain.data.readers.decoding_rate import decoding_rate
from vaetrain.data.readers.indexed import IndexedReader
from vaetrain.data.readers.loader_workers import choose_num_workers
from vaetrain.data.readers.order import BatchLayout
from vaetrain.data.readers.resident import ResidentReader
from vaetrain.data.readers.selection import Selection
from vaetrain.data.readers.shared_array import Gather
from vaetrain.data.readers.stream import StreamReader
from vaetrain.data.readers.stream_order import too_few_shards, workers_for
from vaetrain.data.remote.remote import RemoteShards, open_shard_set
from vaetrain.distributed import processes
from vaetrain.machine import num_cores

__all__ = ["Batch", "Reader", "open_reader", "open_selection", "open_split"]


@runtime_checkable  # for the type checks of the tests
class Reader(Protocol):
    """Batches of one split: uint8 images (b, c, h, w), labels and indices, on the host or already on the device."""

    manifest: Manifest
    """What the shard set says about itself."""

    num_images: int
    """Images of the split after the class filter."""

    description: str
    """One line: which reader, why, how many images, what it occupies; and one with a warning, where there is cause."""

    def train_batches(self, seed: int, images_seen: int, layout: BatchLayout) -> Iterator[Batch]:
        """Endless micro-batches of this process, from the global position `images_seen` on.

        Raises ValueError when `images_seen` is inside a global batch, the split is smaller than one, or a sample is
        damaged.
        """
        ...

    def eval_batches(self, batch_size: int, rank: int, num_processes: int) -> Iterator[Batch]:
        """One pass over the split, each image exactly once over all processes; the last batch may be smaller."""
        ...

    def first(self, num_images: int) -> Batch:
        """The first images of the split (all when it has fewer), read in this process."""
        ...

    def subset(self, positions: Int64[np.ndarray, " n"]) -> Reader:
        """The images at `positions`, which ascend, and no others: image i of it is image positions[i] of this.

        Only those are read and decoded. To be closed by itself.
        """
        ...

    def close(self) -> None:
        """End the worker processes, and with them any pass that is still running."""
        ...


def open_split(config: DataConfig, accelerator: Accelerator, split: Literal["train", "val"]) -> Reader:
    """`open_reader` for the processes of a run, all of which call this: they share work and memory where they can."""
    return open_reader(
        config, split, device=accelerator.device, processes_per_node=processes.processes_per_node(),
        rank=accelerator.process_index, num_processes=accelerator.num_processes,
        gather=partial(processes.gather_integers, accelerator),
    )  # fmt: skip


def open_reader(
    config: DataConfig,
    split: Literal["train", "val"],
    *,
    device: torch.device,
    processes_per_node: int = 1,
    rank: int = 0,
    num_processes: int = 1,
    gather: Gather | None = None,
) -> Reader:
    """The reader that `config` asks for or, with `auto`, the fastest that can read this split.

    `processes_per_node` training processes share the cores; of `num_processes`, each verifies its share of the shards when
    `--data.verify full` asks for it. Several processes that share a machine keep resident images once, if they are given a
    way to agree on it: `gather` makes this a collective. Raises FileNotFoundError when there is no shard set and
    ValueError when it lacks the split or a class, or cannot be read the way the configuration asks for.
    """
    num_workers = config.num_workers
    if num_workers is None:
        num_workers = choose_num_workers(device, processes_per_node)
    selection, remote = open_selection(config, split)
    if remote:
        remote.prepare(selection.shard_set.manifest.splits[split])
    elif config.verify == "full":
        selection.shard_set.verify(full=True, split=split, part=rank, num_parts=num_processes)
    rate = partial(decoding_rate, selection, num_workers, config.timeout_s) if device.type == "cuda" else None
    name, reason = choose_reader(config, selection, remote=remote is not None, decoding_rate=rate, gather=gather)
    if name == "stream":
        if config.num_workers is None:
            num_workers = workers_for(selection.num_shards, num_processes, num_workers)
        if split == "train" and (too_few := too_few_shards(selection.num_shards, num_processes, num_workers)):
            raise ValueError(too_few)
        return StreamReader(
            selection, remote=remote, num_workers=num_workers, device=device, reason=reason, timeout_s=config.timeout_s,
            crop=config.crop,
        )  # fmt: skip
    if name == "resident":
        return ResidentReader(
            selection, num_threads=max(1, num_cores() // processes_per_node), device=device, reason=reason,
            timeout_s=config.timeout_s, rank=rank, gather=gather,
        )  # fmt: skip
    if name == "decoded":
        return DecodedReader(
            selection, folder=decoded_folder(config), max_bytes=int(config.decoded_gib * 2**30), num_threads=num_workers,
            device=device, reason=reason, timeout_s=config.timeout_s, rank=rank, num_processes=num_processes,
        )  # fmt: skip
    return IndexedReader(
        selection, num_workers=num_workers, device=device, reason=reason, timeout_s=config.timeout_s, crop=config.crop
    )


def open_selection(config: DataConfig, split: Literal["train", "val"]) -> tuple[Selection, RemoteShards | None]:
    """The images of a split that `config` keeps and, unless the shards are local and of the right sizes, where they are.

    Raises FileNotFoundError when there is no shard set, and ValueError when it lacks the split, a class or a shard.
    """
    shard_set, remote = open_shard_set(config, config.location(split))
    if remote is None:
        shard_set.verify()
    return Selection.of(shard_set, split, config.classes, source=remote.folder if remote else None), remote
