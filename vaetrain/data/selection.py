"""The images of one split that a run keeps, and where each lies in the shards, without importing torch."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from vaetrain.data.shards import Shard, ShardSet, SplitIndex

# Random access over thousands of shards must stay below the usual limit of 1,024 open files.
MAX_OPEN_SHARDS = 256


@lru_cache(maxsize=MAX_OPEN_SHARDS)
def _open_shard(path: Path) -> io.FileIO:
    # Evicting a file does not close it under a thread that still reads: the last reference does.
    return io.FileIO(path)


@dataclass(frozen=True)
class Selection:
    """A split reduced to the wanted classes; image i of it is row i of `index`, in shard order."""

    source: str
    """Folder or URL of the shard set, for messages."""
    shard_set: ShardSet
    split: str
    index: SplitIndex
    within_shard: Int64[np.ndarray, " n"]
    """Position of each image among all samples of its shard."""

    @classmethod
    def of(cls, shard_set: ShardSet, split: str, classes: tuple[str, ...] = (), source: str | None = None) -> Selection:
        """The images of `split` whose class is one of `classes` (none given: all).

        Raises ValueError for a split or class that the manifest does not have, and when nothing is left.
        """
        source = source or str(shard_set.folder)
        manifest = shard_set.manifest
        if split not in manifest.splits:
            raise ValueError(
                f"{source} has no {split} split, only {' '.join(manifest.splits)}; "
                "make one with tools/make_shards.py --val-count, or name another shard set with --data.val"
            )
        if unknown := [name for name in classes if name not in manifest.classes]:
            raise ValueError(f"--data.classes {' '.join(unknown)}: {source} has {' '.join(manifest.classes)}")
        index = shard_set.index(split)
        first_of_shard = np.cumsum([0, *(shard.num_images for shard in manifest.splits[split].shards)])
        within_shard = np.arange(len(index.label)) - first_of_shard[index.shard]
        if classes:
            keep = np.isin(index.label, [manifest.classes.index(name) for name in classes])
            index = SplitIndex(index.shard[keep], index.offset[keep], index.num_bytes[keep], index.label[keep])
            within_shard = within_shard[keep]
        if len(index.label) == 0:
            raise ValueError(f"{source}: no image of the {split} split is of --data.classes {' '.join(classes)}")
        return cls(source, shard_set, split, index, within_shard)

    @property
    def num_images(self) -> int:
        """Images kept."""
        return len(self.index.label)

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
        """Memory that the index takes in every process that reads, in bytes."""
        columns = (getattr(self.index, field.name) for field in fields(SplitIndex))
        return sum(column.nbytes for column in columns) + self.within_shard.nbytes

    @property
    def num_shards(self) -> int:
        """Shards of the split, whether or not one holds a kept image."""
        return len(self.shard_set.manifest.splits[self.split].shards)

    def in_shards(
        self, shards: Int64[np.ndarray, " shards"], start: int, stop: int
    ) -> Iterator[tuple[int, Int64[np.ndarray, " b"]]]:
        """Images start..stop of the kept images of `shards` laid end to end: each shard that has some, and which."""
        if start >= stop:
            return
        edges = np.searchsorted(self.index.shard, np.arange(self.num_shards + 1))
        firsts, counts = edges[shards], np.diff(edges)[shards]
        befores = np.cumsum(counts) - counts
        for at in np.flatnonzero((befores < stop) & (befores + counts > start) & (counts > 0)).tolist():
            shard, first, before, count = int(shards[at]), int(firsts[at]), int(befores[at]), int(counts[at])
            yield shard, np.arange(first + max(start - before, 0), first + min(stop - before, count))

    def shard_of(self, position: int) -> Shard:
        """The shard that holds an image."""
        return self.shard_set.manifest.splits[self.split].shards[int(self.index.shard[position])]

    def where(self, position: int) -> str:
        """Shard, sample and byte offset of an image, for messages."""
        return (
            f"{self.shard_of(position).name} in {self.source}, sample {self.within_shard[position]} "
            f"({self.index.num_bytes[position]} bytes at byte {self.index.offset[position]})"
        )

    def read(self, position: int) -> bytearray:
        """The encoded bytes of an image from a local shard; raises ValueError when the shard ends before them."""
        # preadv rather than a memory map: a shard cut short on a network file system is an error here, not SIGBUS.
        encoded = bytearray(int(self.index.num_bytes[position]))
        file = _open_shard(self.shard_set.path(self.shard_of(position)))
        if os.preadv(file.fileno(), [encoded], int(self.index.offset[position])) < len(encoded):
            raise ValueError(f"{self.where(position)}: the shard ends before this image; run tools/verify_shards.py")
        return encoded
