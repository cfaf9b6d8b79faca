"""Shards read from front to back, over HTTP or from disk, for shard sets too large to keep.

stream_order.py says who reads what. Every process has the same number of batches, each image comes at most once an epoch, and
the order is fixed as long as the numbers of processes and workers are. Within its piece a worker shuffles through a buffer.

A shard is read from the first image that is wanted to the last, at the places that the index gives, and not taken apart as a
tar; the header before each image shows that the shard is the one that was indexed. Resuming reads of the current epoch only
what was not trained on.
"""

from __future__ import annotations

import random
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader, FileIO
from itertools import count, islice
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.filters import shuffle

from vaetrain.data.format.manifest import TAR_BLOCK, Shard
from vaetrain.data.readers.batch import Batch, batch_buffer, decode_image, make_batch
from vaetrain.data.readers.loader_workers import BatchOrError, WorkerPool
from vaetrain.data.readers.order import BatchLayout, crop_places, epoch_order, seen_before
from vaetrain.data.readers.selection import Selection
from vaetrain.data.readers.stream_order import SHUFFLE_BUFFER, eval_piece, train_piece
from vaetrain.data.readers.worker_progress import note_reading
from vaetrain.data.remote.remote import RemoteShards
from vaetrain.files import READ_BYTES

REMEDY = "copy the shard again from where it came, and check it with tools/verify_shards.py"

T = TypeVar("T")
Sample = tuple[int, bytearray]
"""Position in the selection, encoded image."""


@dataclass(frozen=True)
class Stream:
    """Sequential access to a selection; picklable, its shards are opened anew in every worker."""

    selection: Selection
    remote: RemoteShards | None
    """Where the shards are when they are not in the selection's folder."""

    def images(
        self,
        shards: Int64[np.ndarray, " shards"],
        start: int,
        stop: int,
        unwanted: Bool[np.ndarray, " n"] | None = None,
    ) -> Iterator[Sample]:
        """Images start..stop of the kept images of `shards` laid end to end; those `unwanted` are empty and not read."""
        first = 0
        for shard, positions in self.selection.in_shards(shards, start, stop):
            skip = np.zeros(len(positions), dtype=bool) if unwanted is None else unwanted[first:][: len(positions)]
            first += len(positions)
            yield from self._read(shard, positions, skip)

    def _read(
        self, shard_number: int, positions: Int64[np.ndarray, " b"], skip: Bool[np.ndarray, " b"]
    ) -> Iterator[Sample]:
        selection, wanted = self.selection, positions[~skip]
        if not len(wanted):
            yield from ((position, bytearray()) for position in positions.tolist())
            return
        shard = selection.shard_set.manifest.splits[selection.split].shards[shard_number]
        offsets, sizes = (column[positions].tolist() for column in (selection.index.offset, selection.index.num_bytes))
        position = int(wanted[0])
        start, last = int(selection.index.offset[position]) - TAR_BLOCK, int(wanted[-1])
        try:
            with self._open(shard, start, int(selection.index.offset[last] + selection.index.num_bytes[last])) as file:
                for position, offset, size, skipped in zip(
                    positions.tolist(), offsets, sizes, skip.tolist(), strict=True
                ):
                    note_reading(position, last)
                    yield position, bytearray() if skipped else _image_at(file, offset, size)
        except (OSError, ValueError) as error:
            raise ValueError(f"{selection.where(position)}: {error}; {REMEDY}") from error

    def _open(self, shard: Shard, start: int, stop: int) -> BufferedReader:
        if self.remote:
            return self.remote.open(shard, start, stop)
        return BufferedReader(FileIO(self.selection.shard_set.path(shard)), READ_BYTES)

    def batch(self, samples: list[Sample], places: Float64[np.ndarray, " b"] | None = None) -> Batch:
        """Decode samples, cut out at `places` (None: in the middle); raises ValueError naming the one that is damaged."""
        pixels = batch_buffer((len(samples), *self.selection.image_shape))
        middle = [None] * len(samples)
        for (position, encoded), image, place in zip(
            samples, pixels, middle if places is None else places.tolist(), strict=True
        ):
            decode_image(self.selection, encoded, position, out=image, place=place)
        return make_batch(self.selection, pixels, np.array([position for position, _ in samples], dtype=np.int64))


@dataclass(frozen=True)
class _TrainBatches(IterableDataset[BatchOrError]):
    """The endless micro-batches of one process. Micro-batch t (from the run's start) is worker t mod num_workers' work."""

    stream: Stream
    seed: int
    images_seen: int
    layout: BatchLayout
    crop: Literal["center", "random"] = "center"

    def __iter__(self) -> Iterator[BatchOrError]:
        return _until_error(self._batches())

    def _batches(self) -> Iterator[Batch]:
        worker, num_workers = _worker()
        selection, micro_batch_size = self.stream.selection, self.layout.micro_batch_size
        start = self.images_seen // self.layout.global_batch_size * self.layout.grad_accum_steps
        # DataLoader takes its first batch from worker 0, and that batch is number `start`.
        number = (start + worker) % num_workers
        for epoch in count(start // self.layout.micro_batches_per_epoch(selection.num_images)):
            piece = train_piece(selection.num_images, self.seed, epoch, self.layout, number, num_workers)
            order = epoch_order(selection.num_shards, self.seed, epoch)
            seen = sum(batch < start for batch in piece.batches)
            # Several pieces of one epoch may lie in one shard; each shuffles differently.
            shuffle_seed = f"{self.seed} {epoch} {piece.images.start}"
            trained = np.zeros(len(piece.images), dtype=bool)
            for image in islice(_shuffled(range(len(trained)), shuffle_seed), seen * micro_batch_size):
                trained[image] = True
            samples = self.stream.images(order, piece.images.start, piece.images.stop, unwanted=trained)
            samples = islice(_shuffled(samples, shuffle_seed), seen * micro_batch_size, None)
            for batch in piece.batches[seen:]:
                random_crop = self.crop == "random"
                places = crop_places(self.seed, seen_before(batch, self.layout)) if random_crop else None
                yield self.stream.batch(list(islice(samples, micro_batch_size)), places)


@dataclass(frozen=True)
class _EvalBatches(IterableDataset[BatchOrError]):
    """One pass of one process: consecutive blocks of the split, an equal stretch of them for each process and worker."""

    stream: Stream
    batch_size: int
    rank: int
    num_processes: int

    def __iter__(self) -> Iterator[BatchOrError]:
        return _until_error(self._batches())

    def _batches(self) -> Iterator[Batch]:
        worker, num_workers = _worker()
        selection = self.stream.selection
        part, num_parts = self.rank * num_workers + worker, self.num_processes * num_workers
        piece = eval_piece(selection.num_images, self.batch_size, part, num_parts)
        samples = self.stream.images(np.arange(selection.num_shards), piece.start, piece.stop)
        while block := list(islice(samples, self.batch_size)):
            yield self.stream.batch(block)


class StreamReader:
    """Batches from shards read in sequence; memory is a shuffle buffer of encoded images per worker."""

    def __init__(
        self,
        selection: Selection,
        *,
        remote: RemoteShards | None,
        num_workers: int,
        device: torch.device,
        reason: str,
        timeout_s: float,
        crop: Literal["center", "random"] = "center",
    ) -> None:
        self._crop = crop
        self._options: dict[str, Any] = {
            "remote": remote,
            "num_workers": num_workers,
            "device": device,
            "timeout_s": timeout_s,
            "crop": crop,
        }
        self.manifest = selection.shard_set.manifest
        self.num_images = selection.num_images
        self.num_workers = num_workers
        self.description = (
            f"stream ({reason}): {self.num_images:,} images read in sequence from "
            f"{remote.description if remote else selection.source}, "
            f"{num_workers} decoding worker(s)"
        )
        self._stream = Stream(selection, remote)
        self._workers = WorkerPool(num_workers, device, selection.where, timeout_s)

    def train_batches(self, seed: int, images_seen: int, layout: BatchLayout) -> Iterator[Batch]:
        """Endless micro-batches of this process from the global position `images_seen` on.

        Which images have been seen by then depends on the numbers of processes and workers: keep both to resume exactly.
        """
        layout.images_per_epoch(self.num_images)
        layout.check_position(images_seen)
        return self._workers.train_iter(_TrainBatches(self._stream, seed, images_seen, layout, self._crop))

    def eval_batches(self, batch_size: int, rank: int, num_processes: int) -> Iterator[Batch]:
        """This process's share of one pass over the split, every image exactly once over all processes."""
        return self._workers.eval_iter(
            (batch_size, rank, num_processes),
            lambda: _EvalBatches(self._stream, batch_size, rank, num_processes),
            lambda: None,
        )

    def first(self, num_images: int) -> Batch:
        """The first images of the split, or all when it has fewer."""
        shards = np.arange(self._stream.selection.num_shards)
        stop = min(num_images, self.num_images)
        return self._workers.read_inline(lambda: self._stream.batch(list(self._stream.images(shards, 0, stop))))

    def subset(self, positions: Int64[np.ndarray, " n"]) -> StreamReader:
        """The images at `positions` alone: nothing else is fetched."""
        return StreamReader(self._stream.selection.at(positions), reason="a subset", **self._options)

    def close(self) -> None:
        """End the worker processes."""
        self._workers.close()


def _image_at(file: BufferedReader, offset: int, num_bytes: int) -> bytearray:
    """The encoded image at a byte of a tar; raises ValueError when the header before it is not of such a file."""
    file.seek(offset - TAR_BLOCK)
    header, encoded = file.read(TAR_BLOCK), bytearray(num_bytes)
    num_read = file.readinto(encoded)
    if num_read < num_bytes:
        raise ValueError(f"the shard ends at byte {offset + num_read:,}")
    # Bytes 124 to 135 are the size in octal, 156 the kind (0 is a file), 257 to 261 the format, 148 to 155 the sum of all
    # bytes in octal, taken with blanks in their own place.
    if header[156:157] not in (b"0", b"\0"):
        raise ValueError("the image is a link or device in the shard, not a file")
    is_ours = header[124:136] == b"%011o\0" % num_bytes and header[257:262] == b"ustar"
    if is_ours and header[148:156] == b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * ord(" ")):
        return encoded
    try:  # other programs write numbers otherwise
        if tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size == num_bytes:
            return encoded
    except tarfile.HeaderError as error:
        if is_ours:
            raise ValueError("the image's tar header is damaged") from error
    raise ValueError("this is not where the image begins: the shard is another one than its manifest describes")


def _shuffled(items: Iterable[T], seed: str) -> Iterator[T]:
    """Items in an order that depends on the seed and on how many there are, each at most a buffer's length early."""
    return shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, rng=random.Random(seed))(iter(items))


def _until_error(batches: Iterator[Batch]) -> Iterator[BatchOrError]:
    try:
        yield from batches
    except ValueError as error:
        yield error


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)
