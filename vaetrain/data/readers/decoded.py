"""A split kept decoded in a file on this node's disk: each image is decoded once per node, then gathered from the page cache.

For splits that exceed --data.resident-gib where decoding would starve the device. Training begins at once: an image that is
not in the file yet is decoded when a batch wants it, and stays; meanwhile threads decode ahead, in the order in which this process
trains, and then the rest. Processes agree through the file alone (decoded_file.py).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64

from vaetrain.data.readers.batch import Batch, decode_image, empty_batch
from vaetrain.data.readers.decoded_file import DecodedFile
from vaetrain.data.readers.gathering import GatheringReader
from vaetrain.data.readers.order import BatchLayout, eval_indices, train_indices
from vaetrain.data.readers.selection import Selection
from vaetrain.data.readers.worker_progress import ReaderProgress, end_process, stuck_message, watched


class DecodedReader(GatheringReader):
    """Batches gathered from a memory-mapped file of the whole decoded split, which is filled as it is read."""

    def __init__(
        self,
        selection: Selection,
        *,
        folder: Path,
        max_bytes: int,
        num_threads: int,
        device: torch.device,
        reason: str,
        timeout_s: float,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        """Open or make the file; `num_threads` decode ahead (0: only what a batch wants is decoded, when it wants it).

        Raises ValueError where there is no room for the file.
        """
        self.manifest = selection.shard_set.manifest
        self.num_images = selection.num_images
        self._selection, self._timeout_s, self._pin = selection, timeout_s, device.type == "cuda"
        self._rank, self._num_processes = rank, num_processes
        self._file = DecodedFile(selection, folder, max_bytes)
        self._labels = torch.from_numpy(selection.index.label.astype(np.int64))
        self._builder = _Builder(selection, self._file, num_threads)
        there = int(np.count_nonzero(self._file.is_there))
        state = "all there" if there == self.num_images else f"{there:,} there, the others decoded as they are read"
        self.description = (
            f"decoded ({reason}): {self.num_images:,} images from {selection.source}, "
            f"{selection.decoded_bytes / 2**30:.2f} GiB in {folder}, {state}"
        )

    def train_batches(self, seed: int, images_seen: int, layout: BatchLayout) -> Iterator[Batch]:
        """See `Reader`; from now on threads decode ahead in this order."""
        if not self._file.is_whole:
            epoch = layout.micro_batches_per_epoch(self.num_images)
            ahead = islice(train_indices(self.num_images, seed, images_seen, layout), epoch)
            first = self.num_images * self._rank // self._num_processes
            rest = np.roll(np.arange(self.num_images), -first)
            self._builder.start(chain(ahead, np.array_split(rest, -(-self.num_images // layout.micro_batch_size))))
        return super().train_batches(seed, images_seen, layout)

    def eval_batches(self, batch_size: int, rank: int, num_processes: int) -> Iterator[Batch]:
        """See `Reader`; from now on threads decode ahead in this order."""
        if not self._file.is_whole:
            self._builder.start(eval_indices(self.num_images, batch_size, rank, num_processes))
        return super().eval_batches(batch_size, rank, num_processes)

    def subset(self, positions: Int64[np.ndarray, " n"]) -> _SubsetOfDecoded:
        """The images at `positions` alone, in the same file."""
        return _SubsetOfDecoded(self, positions)

    def close(self) -> None:
        """End the threads."""
        self._builder.stop()
        self._file.close()

    def _gather(self, positions: Int64[np.ndarray, " b"]) -> Batch:
        file = self._file
        if not file.is_whole:
            self._fill(positions)
        images = empty_batch((len(positions), *self._selection.image_shape), pin=self._pin)
        # As in resident.py: one thread of NumPy, and "clip" since "raise" would copy once more.
        np.take(file.pixels, positions, axis=0, out=images.numpy(), mode="clip")
        return Batch(images.permute(0, 3, 1, 2), self._labels[torch.from_numpy(positions)], torch.from_numpy(positions))

    def _fill(self, positions: Int64[np.ndarray, " b"]) -> None:
        """Decode those that are not there; raises ValueError naming one that is damaged."""
        missing = positions[self._file.is_there[positions] == 0]
        if not len(missing):
            return
        progress, selection, timeout_s = ReaderProgress(1), self._selection, self._timeout_s

        def end(reader: int) -> None:
            end_process(stuck_message(progress, reader, selection.where, timeout_s))

        with watched(progress, timeout_s, end), progress.reader(0):
            for position in missing.tolist():
                _decode(selection, self._file, position)
        self._file.finish()


class _SubsetOfDecoded(GatheringReader):
    """Some images of a DecodedReader, in its file; it is closed with that one."""

    def __init__(self, reader: DecodedReader, positions: Int64[np.ndarray, " n"]) -> None:
        self._reader, self._positions = reader, positions
        self.manifest, self.num_images = reader.manifest, len(positions)
        self.description = f"{reader.description}; of these {self.num_images:,}"

    def subset(self, positions: Int64[np.ndarray, " n"]) -> _SubsetOfDecoded:
        """The images at `positions` of these."""
        return _SubsetOfDecoded(self._reader, self._positions[positions])

    def close(self) -> None:
        """Nothing to end."""

    def _gather(self, positions: Int64[np.ndarray, " b"]) -> Batch:
        batch = self._reader._gather(self._positions[positions])
        return batch._replace(indices=torch.from_numpy(positions))


class _Builder:
    """Threads that decode ahead what is asked for, until all of it is there or they are stopped.

    A damaged image is left to the batch that wants it, which says so.
    """

    def __init__(self, selection: Selection, file: DecodedFile, num_threads: int) -> None:
        self._selection, self._file, self._num_threads = selection, file, num_threads
        self._threads: list[threading.Thread] = []
        self._stopped = threading.Event()

    def start(self, ahead: Iterable[Int64[np.ndarray, " b"]]) -> None:
        """Decode these from now on, in place of what was asked for before."""
        self.stop()
        self._stopped = threading.Event()
        pieces, lock = iter(ahead), threading.Lock()
        # Threads, since JPEGs are decoded without the GIL.
        self._threads = [
            threading.Thread(target=self._run, args=(pieces, lock, self._stopped), daemon=True, name="decode ahead")
            for _ in range(self._num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads, each after the image it is at."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _run(self, pieces: Iterator[Int64[np.ndarray, " b"]], lock: threading.Lock, stopped: threading.Event) -> None:
        while True:
            with lock:
                piece = next(pieces, None)
            if piece is None:
                self._file.finish()
                return
            for position in piece[self._file.is_there[piece] == 0].tolist():
                if stopped.is_set():
                    return
                try:
                    _decode(self._selection, self._file, position)
                except ValueError:
                    continue


def _decode(selection: Selection, file: DecodedFile, position: int) -> None:
    """Decode an image into its place, if it is not there."""
    if not file.is_there[position]:
        decode_image(selection, selection.read(position), position, out=file.pixels[position])
        file.is_there[position] = 1
