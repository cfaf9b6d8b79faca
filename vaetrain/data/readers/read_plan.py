"""What a run on so many processes would read, from the manifest and the index alone, without importing torch.

The numbers come from the functions that the readers follow (order.py, stream_order.py, choose.py, selection.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int64

from vaetrain.data.config import PREFETCH_BATCHES_PER_WORKER, DataConfig
from vaetrain.data.format.shard_set import ShardSet
from vaetrain.data.readers.choose import choose_reader
from vaetrain.data.readers.order import BatchLayout, epoch_order, eval_starts
from vaetrain.data.readers.selection import Selection
from vaetrain.data.readers.stream_order import SHUFFLE_BUFFER, eval_piece, too_few_shards, train_piece
from vaetrain.data.remote.remote import is_remote, open_shard_set


@dataclass(frozen=True)
class SplitForecast:
    """How one split is read."""

    num_images: int
    """Images after the class filter."""

    num_shards: int
    """Shards of the split."""

    reader: Literal["indexed", "resident", "stream", "decoded"]
    """The reader that would be opened."""

    reason: str
    """Why that one."""

    batches_per_rank: tuple[int, ...]
    """Micro-batches that each process takes in one epoch of training, or in one validation."""

    shards_per_worker: tuple[tuple[int, ...], ...]
    """For the stream, per process and worker, the shards it opens in the first epoch (or in a validation); else empty."""

    memory_bytes: int
    """Of each process with its workers, over what the libraries take: index, batches and buffers."""

    node_memory_bytes: int
    """Of each node besides, shared by its processes: the decoded split of the resident reader. On a GPU that has room for it, the
    split moves there, into the memory of each."""

    @property
    def shards_opened(self) -> int:
        """Times that the stream opens a shard in one epoch, over all processes and workers."""
        return sum(map(sum, self.shards_per_worker))


@dataclass(frozen=True)
class ReadPlan:
    """How a run reads its data: the training split, epoch by epoch, and the validation split, pass by pass."""

    num_processes: int
    """Training processes."""

    num_workers: int
    """Decoding workers of each process."""

    global_batch_size: int
    """Images per optimizer step over all processes."""

    micro_batch_size: int
    """Images one process handles at a time."""

    steps_per_epoch: int
    """Optimizer steps, the same in every process."""

    images_per_epoch: int
    """Images trained on in one epoch, over all processes."""

    images_dropped: int
    """Images left out of each epoch, others in every epoch."""

    train: SplitForecast
    """The training split."""

    val: SplitForecast | None
    """The validation split; None when the shard set has none, and training would refuse it."""

    @classmethod
    def of(
        cls,
        config: DataConfig,
        *,
        num_processes: int,
        global_batch_size: int,
        micro_batch_size: int | None,
        seed: int = 0,
    ) -> ReadPlan:
        """Read the manifests and indices of the shard sets, local or behind URLs; `config.num_workers` must be set.

        Raises what a run would: FileNotFoundError without a shard set, ValueError for sizes that do not divide, for a
        class that is not there, and when the split is smaller than a global batch.
        """
        assert config.num_workers is not None
        if num_processes < 1:
            raise ValueError(f"--plan {num_processes} {config.num_workers}: give at least 1 process")
        layouts = [
            BatchLayout.of(global_batch_size, micro_batch_size, rank, num_processes) for rank in range(num_processes)
        ]
        layout = layouts[0]
        train_set, train_source = _open(config, "train")
        train = Selection.of(train_set, "train", config.classes, source=train_source)
        val_set, val_source = _open(config, "val") if config.val else (train_set, train_source)
        # A set given for validation must have the split; the training set need not, for this purpose.
        has_val = config.val is not None or "val" in val_set.manifest.splits
        val = Selection.of(val_set, "val", config.classes, source=val_source) if has_val else None
        images_per_epoch = layout.images_per_epoch(train.num_images)
        return cls(
            num_processes=num_processes,
            num_workers=config.num_workers,
            global_batch_size=global_batch_size,
            micro_batch_size=layout.micro_batch_size,
            steps_per_epoch=layout.steps_per_epoch(train.num_images),
            images_per_epoch=images_per_epoch,
            images_dropped=train.num_images - images_per_epoch,
            train=_forecast_train(config, train, layouts, seed),
            val=_forecast_val(config, val, layout) if val else None,
        )

    @property
    def images_per_rank(self) -> int:
        """Images that each process trains on in one epoch."""
        return self.images_per_epoch // self.num_processes

    @property
    def warnings(self) -> list[str]:
        """What works but is likely not meant, each with its remedy."""
        found = []
        if self.val is None:
            found.append(
                "there is no val split, and training needs one: make it with tools/make_shards.py --val-count, or name "
                "another shard set with --data.val"
            )
        train = self.train
        if train.reader == "stream":
            few = too_few_shards(train.num_shards, self.num_processes, self.num_workers)
            found += [few] if few else []
        return found

    def describe(self) -> str:
        """The forecast as lines of text."""
        train = self.train
        accumulated = train.batches_per_rank[0] // self.steps_per_epoch
        lines = [
            (
                f"plan for {self.num_processes} process(es) of {self.num_workers} worker(s), global batch "
                f"{self.global_batch_size:,}: {accumulated} micro-batch(es) of {self.micro_batch_size:,} in each process"
            ),
            f"train: {_reading(train)}",
            (
                f"  an epoch: {self.steps_per_epoch:,} steps, {self.images_per_epoch:,} of {train.num_images:,} images, "
                f"{self.images_per_rank:,} in each process, {self.images_dropped:,} dropped (others in every epoch)"
            ),
            f"  memory: {_memory(train)}",
        ]
        if self.val:
            lines += [
                f"val: {_reading(self.val)}",
                (
                    f"  a pass: {self.val.num_images:,} images, none dropped, "
                    f"{_span(list(self.val.batches_per_rank))} batches in each process"
                ),
                f"  memory: {_memory(self.val)}",
            ]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


def _open(config: DataConfig, split: Literal["train", "val"]) -> tuple[ShardSet, str | None]:
    """The shard set of a split, and its URL if it has one."""
    shard_set, remote = open_shard_set(config, config.location(split))
    return shard_set, remote.folder if remote else None


def _choose(
    config: DataConfig, selection: Selection
) -> tuple[Literal["indexed", "resident", "stream", "decoded"], str]:
    location = config.location("train" if selection.split == "train" else "val")
    return choose_reader(config, selection, remote=is_remote(location))


def _forecast_train(config: DataConfig, selection: Selection, layouts: list[BatchLayout], seed: int) -> SplitForecast:
    num_images, num_parts = selection.num_images, max(1, config.num_workers or 0)
    order = epoch_order(selection.num_shards, seed, 0)
    pieces = [
        [train_piece(num_images, seed, 0, layout, number, num_parts).images for number in range(num_parts)]
        for layout in layouts
    ]
    batches = tuple(layout.micro_batches_per_epoch(num_images) for layout in layouts)
    return _forecast_split(config, selection, layouts[0].micro_batch_size, batches, order, pieces, SHUFFLE_BUFFER)


def _forecast_val(config: DataConfig, selection: Selection, layout: BatchLayout) -> SplitForecast:
    num_images, num_parts = selection.num_images, max(1, config.num_workers or 0)
    size, num_processes = layout.micro_batch_size, layout.num_processes
    pieces = [
        [eval_piece(num_images, size, rank * num_parts + part, num_processes * num_parts) for part in range(num_parts)]
        for rank in range(num_processes)
    ]
    if _choose(config, selection)[0] == "stream":
        batches = tuple(sum(math.ceil(len(piece) / size) for piece in pieces[rank]) for rank in range(num_processes))
    else:
        batches = tuple(len(eval_starts(num_images, size, rank, num_processes)) for rank in range(num_processes))
    return _forecast_split(config, selection, size, batches, np.arange(selection.num_shards), pieces, size)


def _forecast_split(
    config: DataConfig,
    selection: Selection,
    batch_size: int,
    batches_per_rank: tuple[int, ...],
    shard_order: Int64[np.ndarray, " shards"],
    pieces: list[list[range]],
    num_shuffled: int,
) -> SplitForecast:
    reader, reason = _choose(config, selection)
    num_workers = config.num_workers or 0
    batch_bytes = batch_size * math.prod(selection.image_shape)
    shards_per_worker: tuple[tuple[int, ...], ...] = ()
    if reader in ("resident", "decoded"):
        memory = selection.index_bytes + batch_bytes
    else:
        # Workers share the index; one more batch is with the training process.
        memory = selection.index_bytes + (1 + num_workers * PREFETCH_BATCHES_PER_WORKER) * batch_bytes
    if reader == "stream":
        shards_per_worker = tuple(
            tuple(sum(1 for _ in selection.in_shards(shard_order, piece.start, piece.stop)) for piece in of_process)
            for of_process in pieces
        )
        held = max(min(num_shuffled, len(piece)) for of_process in pieces for piece in of_process)
        memory += max(1, num_workers) * math.ceil(held * selection.index.num_bytes.mean())
    return SplitForecast(
        selection.num_images, selection.num_shards, reader, reason, batches_per_rank, shards_per_worker, memory,
        selection.decoded_bytes if reader == "resident" else 0,
    )  # fmt: skip


def _reading(split: SplitForecast) -> str:
    text = f"{split.reader} ({split.reason}), {split.num_images:,} images in {split.num_shards:,} shards"
    if split.shards_per_worker:
        counts = [count for of_process in split.shards_per_worker for count in of_process]
        per_process = [sum(of_process) for of_process in split.shards_per_worker]
        text += (
            f"; shards opened: {_span(counts)} by each worker, {_span(per_process)} by each process, "
            f"{split.shards_opened:,} in all"
        )
    return text


def _span(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _memory(split: SplitForecast) -> str:
    text = f"{_mebibytes(split.memory_bytes)} in each process"
    return f"{_mebibytes(split.node_memory_bytes)} on each node, {text}" if split.node_memory_bytes else text


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
