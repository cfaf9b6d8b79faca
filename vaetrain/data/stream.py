"""Shards read from front to back, over HTTP or from disk, for shard sets too large to keep.

stream_order.py says who reads what. Every process has the same number of batches, each image comes at most once an epoch, and
the order is fixed as long as the numbers of processes and workers are. Within its piece a worker shuffles through a buffer.

Resuming reads over the images of the current epoch that were seen already without decoding them: up to one piece of
reading before the first batch.
"""

from __future__ import annotations

import random
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from io import BufferedIOBase
from itertools import count, islice
from pathlib import Path
from tarfile import TarError
from typing import cast
from urllib.parse import quote

import numpy as np
import torch
from jaxtyping import Int64
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.filters import shuffle
from webdataset.tariterators import tar_file_expander

from vaetrain.data.batch import Batch, decode_image, make_batch
from vaetrain.data.choice import remote_folder
from vaetrain.data.order import BatchLayout, epoch_order
from vaetrain.data.selection import Selection
from vaetrain.data.shards import INDEX_NAME, MANIFEST_NAME, ShardSet
from vaetrain.data.stream_order import SHUFFLE_BUFFER, eval_piece, train_piece
from vaetrain.data.whereabouts import note_reading
from vaetrain.data.workers import Outcome, WorkerPool

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
TIMEOUT_SECONDS = 60

Sample = tuple[int, bytes]
"""Position in the selection, encoded image."""


@dataclass(frozen=True)
class Stream:
    """Sequential access to a selection; picklable, its shards are opened anew in every worker."""

    selection: Selection
    url: str | None
    """URL of the folder that the shards lie in, with its trailing slash; None: local."""

    def images(self, shards: Int64[np.ndarray, " shards"], start: int, stop: int) -> Iterator[Sample]:
        """Images start..stop of the kept images of `shards` laid end to end."""
        for shard, wanted in self.selection.in_shards(shards, start, stop):
            yield from self._read(shard, wanted)

    def _read(self, shard_number: int, wanted: Int64[np.ndarray, " b"]) -> Iterator[Sample]:
        selection = self.selection
        shard = selection.shard_set.manifest.splits[selection.split].shards[shard_number]
        location = f"{self.url}{quote(shard.name)}" if self.url else str(selection.shard_set.path(shard))
        position_of = dict(zip(selection.within_shard[wanted].tolist(), wanted.tolist(), strict=True))
        found = 0
        try:
            with closing(_open(location)) as stream:
                # Not webdataset's own opener, which starts curl, nor its decoders, which unpickle.
                files = tar_file_expander([{"url": location, "stream": stream}], select_files=_is_image, eof_value=None)
                for file in files:
                    note_reading(int(wanted[0]), int(wanted[-1]))
                    position = position_of.pop(found, None)
                    found += 1
                    if position is None:
                        continue
                    if len(file["data"]) != selection.index.num_bytes[position]:
                        raise ValueError(
                            f"{location} is not what its manifest describes: {selection.where(position)} differs"
                        )
                    yield position, file["data"]
                    if not position_of:
                        return
        except (OSError, HTTPException, TarError) as error:
            # webdataset appends the open file and the location to a TarError's arguments.
            cause = error.args[0] if isinstance(error, TarError) else error
            raise ValueError(f"{location} broke off after {found} of {shard.num_images} images: {cause}") from error
        # A tar cut between two members reads like a whole one.
        raise ValueError(f"{location} ends after {found} of {shard.num_images} images; run tools/verify_shards.py")

    def batch(self, samples: list[Sample]) -> Batch:
        """Decode samples; raises ValueError naming the one that is damaged."""
        pixels = np.empty((len(samples), *self.selection.image_shape), dtype=np.uint8)
        for (position, encoded), image in zip(samples, pixels, strict=True):
            decode_image(self.selection, bytearray(encoded), position, out=image)
        return make_batch(self.selection, pixels, np.array([position for position, _ in samples], dtype=np.int64))


@dataclass(frozen=True)
class _TrainBatches(IterableDataset[Outcome]):
    """The endless micro-batches of one process. Micro-batch t (from the run's start) is worker t mod num_workers' work."""

    stream: Stream
    seed: int
    images_seen: int
    layout: BatchLayout

    def __iter__(self) -> Iterator[Outcome]:
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
            samples = self.stream.images(order, piece.images.start, piece.images.stop)
            # Several pieces of one epoch may lie in one shard; each shuffles differently.
            rng = random.Random(f"{self.seed} {epoch} {piece.images.start}")
            samples = shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, rng=rng)(samples)
            seen = sum(batch < start for batch in piece.batches)
            samples = islice(samples, seen * micro_batch_size, None)
            for _ in piece.batches[seen:]:
                yield self.stream.batch(list(islice(samples, micro_batch_size)))


@dataclass(frozen=True)
class _EvalBatches(IterableDataset[Outcome]):
    """One pass of one process: consecutive blocks of the split, an equal stretch of them for each process and worker."""

    stream: Stream
    batch_size: int
    rank: int
    num_processes: int

    def __iter__(self) -> Iterator[Outcome]:
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
        url: str | None,
        num_workers: int,
        device: torch.device,
        reason: str,
        timeout_s: float,
    ) -> None:
        self.manifest = selection.shard_set.manifest
        self.num_images = selection.num_images
        self.description = (
            f"stream ({reason}): {self.num_images:,} images read in sequence from {selection.source}, "
            f"{num_workers} decoding worker(s)"
        )
        self._stream = Stream(selection, url)
        self._workers = WorkerPool(num_workers, device, selection.where, timeout_s)

    def train_batches(self, seed: int, images_seen: int, layout: BatchLayout) -> Iterator[Batch]:
        """Endless micro-batches of this process from the global position `images_seen` on.

        Which images have been seen by then depends on the numbers of processes and workers: keep both to resume exactly.
        """
        layout.images_per_epoch(self.num_images)
        layout.check_position(images_seen)
        return self._workers.once(_TrainBatches(self._stream, seed, images_seen, layout))

    def eval_batches(self, batch_size: int, rank: int, num_processes: int) -> Iterator[Batch]:
        """This process's share of one pass over the split, every image exactly once over all processes."""
        return self._workers.repeated(
            (batch_size, rank, num_processes),
            lambda: _EvalBatches(self._stream, batch_size, rank, num_processes),
            lambda: None,
        )

    def first(self, num_images: int) -> Batch:
        """The first images of the split, or all when it has fewer."""
        shards = np.arange(self._stream.selection.num_shards)
        stop = min(num_images, self.num_images)
        return self._workers.here(lambda: self._stream.batch(list(self._stream.images(shards, 0, stop))))

    def close(self) -> None:
        """End the worker processes."""
        self._workers.close()


def fetch_selection(url: str, split: str, classes: tuple[str, ...]) -> Selection:
    """The wanted images of the shard set in a remote folder, from its manifest and index; FileNotFoundError without them."""
    with tempfile.TemporaryDirectory() as folder:
        for name in (MANIFEST_NAME, INDEX_NAME):
            try:
                with closing(_open(url + name)) as remote:
                    (Path(folder) / name).write_bytes(remote.read())
            except (OSError, HTTPException) as error:
                raise FileNotFoundError(f"no shard set at {url}: {name}: {error}") from error
        return Selection.of(ShardSet.open(folder), split, classes, source=url)


def _open(location: str) -> BufferedIOBase:
    if remote_folder(location):
        return cast(HTTPResponse, urllib.request.urlopen(location, timeout=TIMEOUT_SECONDS))
    return open(location, "rb")


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _until_error(batches: Iterator[Batch]) -> Iterator[Outcome]:
    try:
        yield from batches
    except ValueError as error:
        yield error


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)
