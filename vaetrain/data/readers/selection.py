"""The images of one split that a run keeps, and where each lies in the shards, without importing torch."""

from __future__ import annotations

import io
import math
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32, Int64

from vaetrain.data.format.index import SplitIndex
from vaetrain.data.format.manifest import Manifest, Shard
from vaetrain.data.format.shard_set import ShardSet
from vaetrain.data.readers.shared_memory import SharedMemory
from vaetrain.data.readers.worker_progress import note_reading

# Columns of an ImageTable, the widest first so that all are aligned.
COLUMN_BYTES = {"offset": 8, "shard": 4, "num_bytes": 4, "label": 4, "within_shard": 4}
# Random access over thousands of shards must stay below the usual limit of 1,024 open files.
MAX_OPEN_SHARDS = 256


@lru_cache(maxsize=MAX_OPEN_SHARDS)
def open_shard(folder: Path, name: str) -> io.FileIO:
    """A shard, open for reading, as long as so many others have not been read since; `name` may be an absolute path."""
    # Evicting a file does not close it under a thread that still reads: the last reference does.
    return io.FileIO(folder / name)


class ImageTable:
    """One row for each image kept, in memory that worker processes share: 24 bytes an image, once for a training process."""

    shard: Int32[np.ndarray, " n"]
    """Position in the split's shards; ascending."""
    offset: Int64[np.ndarray, " n"]
    """First byte of the encoded image in its shard."""
    num_bytes: Int32[np.ndarray, " n"]
    """Length of the encoded image."""
    label: Int32[np.ndarray, " n"]
    """Position in the manifest's classes."""
    within_shard: Int32[np.ndarray, " n"]
    """Position among all samples of the shard."""

    def __init__(self, num_images: int) -> None:
        """Room for so many rows, of zeros."""
        self._map_columns(SharedMemory(max(1, num_images * self.bytes_per_image())), num_images)

    @classmethod
    def of(cls, index: SplitIndex, shards: tuple[Shard, ...], keep: Bool[np.ndarray, " all"] | None) -> ImageTable:
        """The rows that `keep` says, or all, of the index of a split."""
        first_of_shard = np.cumsum([0, *(shard.num_images for shard in shards)])
        table = cls(len(index.label) if keep is None else int(np.count_nonzero(keep)))
        chosen = slice(None) if keep is None else keep
        for name in ("shard", "offset", "num_bytes", "label"):
            getattr(table, name)[:] = getattr(index, name)[chosen]
        table.within_shard[:] = np.arange(len(index.label))[chosen] - first_of_shard[table.shard]
        return table

    def rows(self, positions: Int64[np.ndarray, " n"]) -> ImageTable:
        """A table of the rows at `positions`, in their order."""
        table = ImageTable(len(positions))
        for name in COLUMN_BYTES:
            getattr(table, name)[:] = getattr(self, name)[positions]
        return table

    def _map_columns(self, memory: SharedMemory, num_images: int) -> None:
        self._memory, self._num_images = memory, num_images
        start = 0
        for name, size in COLUMN_BYTES.items():
            setattr(self, name, memory.array((num_images,), f"i{size}", start))
            start += num_images * size

    def __len__(self) -> int:
        """Images."""
        return self._num_images

    def __getstate__(self) -> tuple[SharedMemory, int]:
        """The shared memory, not what is in it."""
        return self._memory, self._num_images

    def __setstate__(self, state: tuple[SharedMemory, int]) -> None:
        """Map the same memory."""
        self._map_columns(*state)

    @staticmethod
    def bytes_per_image() -> int:
        """Size of a row."""
        return sum(COLUMN_BYTES.values())


def count_images(manifest: Manifest, split: str, classes: tuple[str, ...], source: str) -> int:
    """Images of `split` whose class is one of `classes` (none given: all), as the manifest counts them; no index is read.

    Raises ValueError for a split or class that the manifest, which is that of `source`, does not have, and when nothing is
    left.
    """
    if split not in manifest.splits:
        raise ValueError(
            f"{source} has no {split} split, only {' '.join(manifest.splits)}; "
            "make one with tools/make_shards.py --val-count, or name another shard set with --data.val"
        )
    classes = as_in_manifest(manifest, classes)
    if unknown := [name for name in classes if name not in manifest.classes]:
        raise ValueError(f"--data.classes {' '.join(unknown)}: {source} has {' '.join(manifest.classes)}")
    counts = manifest.splits[split].class_counts
    num_images = sum(counts[name] for name in classes or counts)
    if num_images == 0:
        raise ValueError(f"{source}: no image of the {split} split is of --data.classes {' '.join(classes)}")
    return num_images


def as_in_manifest(manifest: Manifest, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Names of classes as the manifest composes their letters: a file system's é may be e and an accent, a keyboard's is one."""
    composed = {unicodedata.normalize("NFC", name): name for name in manifest.classes}
    return tuple(
        name if name in manifest.classes else composed.get(unicodedata.normalize("NFC", name), name) for name in classes
    )


@dataclass(frozen=True)
class Selection:
    """A split reduced to the wanted classes; image i of it is row i of `index`, in shard order.

    Pickled to worker processes, it shares the memory of its index with them.
    """

    source: str
    """Folder or URL of the shard set, for messages."""
    shard_set: ShardSet
    split: str
    index: ImageTable

    @classmethod
    def of(cls, shard_set: ShardSet, split: str, classes: tuple[str, ...] = (), source: str | None = None) -> Selection:
        """The images of `split` whose class is one of `classes` (none given: all).

        Raises ValueError for a split or class that the manifest does not have, and when nothing is left.
        """
        source = source or str(shard_set.folder)
        manifest = shard_set.manifest
        count_images(manifest, split, classes, source)
        classes = as_in_manifest(manifest, classes)
        index = shard_set.index(split)
        keep = np.isin(index.label, [manifest.classes.index(name) for name in classes]) if classes else None
        table = ImageTable.of(index, manifest.splits[split].shards, keep)
        # Without the index that the opened set holds in memory.
        return cls(source, ShardSet(shard_set.folder, manifest), split, table)

    def at(self, positions: Int64[np.ndarray, " n"]) -> Selection:
        """The images at `positions`, which ascend; image i of the result is image positions[i] of these."""
        assert np.all(np.diff(positions) > 0), "a selection is in shard order"
        return replace(self, index=self.index.rows(positions))

    @property
    def num_images(self) -> int:
        """Images kept."""
        return len(self.index)

    @property
    def within_shard(self) -> Int32[np.ndarray, " n"]:
        """Position of each image among all samples of its shard."""
        return self.index.within_shard

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        manifest = self.shard_set.manifest
        return (manifest.image_size, manifest.image_size, manifest.channels)

    @property
    def decoded_bytes(self) -> int:
        """Size of all images as uint8 pixels, in bytes."""
        return self.num_images * math.prod(self.image_shape)

    @property
    def index_bytes(self) -> int:
        """Memory that the index takes in a training process together with its workers, in bytes."""
        return self.num_images * ImageTable.bytes_per_image()

    @property
    def num_shards(self) -> int:
        """Shards of the split, whether or not one holds a kept image."""
        return len(self.shard_set.manifest.splits[self.split].shards)

    def in_shards(
        self, shards: Int64[np.ndarray, " shards"], start: int, stop: int
    ) -> Iterator[tuple[int, Int64[np.ndarray, " b"]]]:
        """Images start..stop of the kept images of `shards` laid end to end: each shard that has some, and which.

        Meant to be read as they come: each shard is noted in worker_progress.py when its turn comes.
        """
        if start >= stop:
            return
        edges = np.searchsorted(self.index.shard, np.arange(self.num_shards + 1))
        firsts, counts = edges[shards], np.diff(edges)[shards]
        befores = np.cumsum(counts) - counts
        for at in np.flatnonzero((counts > 0) & (befores < stop) & (befores + counts > start)).tolist():
            shard, first, before, count = int(shards[at]), int(firsts[at]), int(befores[at]), int(counts[at])
            wanted = np.arange(first + max(start - before, 0), first + min(stop - before, count))
            note_reading(int(wanted[0]), int(wanted[-1]))
            yield shard, wanted

    def shard_of(self, position: int) -> Shard:
        """The shard that holds an image."""
        return self.shard_set.manifest.splits[self.split].shards[int(self.index.shard[position])]

    def where(self, position: int, last: int | None = None) -> str:
        """Shard, sample and byte offset of an image, for messages; shard and samples up to `last` of the same shard."""
        shard = f"{self.shard_of(position).name} in {self.source}"
        if last is not None and last > position:
            return f"{shard}, samples {self.within_shard[position]} to {self.within_shard[last]}"
        return (
            f"{shard}, sample {self.within_shard[position]} "
            f"({self.index.num_bytes[position]} bytes at byte {self.index.offset[position]})"
        )

    def read(self, position: int) -> bytes:
        """The encoded bytes of an image from a local shard; raises ValueError when the shard cannot be read there."""
        # pread rather than a memory map: a shard cut short on a network file system is an error here, not SIGBUS.
        note_reading(position, position)
        num_bytes = int(self.index.num_bytes[position])
        try:
            shard = self.shard_of(position)
            file = open_shard(self.shard_set.folder, shard.url or shard.name)
            encoded = os.pread(file.fileno(), num_bytes, int(self.index.offset[position]))
        except OSError as error:
            raise ValueError(f"{self.where(position)}: {error}; is the storage still there?") from error
        if len(encoded) < num_bytes:
            raise ValueError(f"{self.where(position)}: the shard ends before this image; run tools/verify_shards.py")
        return encoded
