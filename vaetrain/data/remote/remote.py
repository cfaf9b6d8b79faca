"""A remote folder of shards, without importing torch.

https://HOST/FOLDER/     HTTP, with ranges where the server knows them
s3:// gs:// hf:// …      fsspec and the package that it has for the scheme
"""

from __future__ import annotations

import io
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vaetrain.data.config import DataConfig
from vaetrain.data.format.index import INDEX_TYPES
from vaetrain.data.format.manifest import INDEX_NAME, MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, Shard, Split
from vaetrain.data.format.shard_set import ShardSet
from vaetrain.data.remote.cache import ShardCache
from vaetrain.data.remote.remote_file import DEFAULT_PERSISTENCE, Persistence, RemoteFile
from vaetrain.data.remote.url import remote_folder
from vaetrain.files import READ_BYTES

INDEX_HEADER_BYTES = 1 << 20
LISTING_S = 1800.0
"""Seconds in which a manifest, or an index, must have come as a whole."""


@dataclass(frozen=True)
class RemoteShards:
    """The shards behind a URL, with or without a cache on this node; picklable."""

    folder: str
    """URL with its trailing slash; or the local folder of a set that points at shards behind URLs."""

    cache: ShardCache | None = None
    """None: nothing is kept."""

    persistence: Persistence = DEFAULT_PERSISTENCE
    """When a shard is given up."""

    @classmethod
    def of(cls, config: DataConfig, location: str) -> RemoteShards | None:
        """What a location names, read the way the configuration says; None: shards that are local.

        Raises ValueError for what is asked and only local shards can do.
        """
        folder = remote_folder(location)
        if folder is None:
            if not is_remote(location):
                return None
            folder = location
        if config.reader in ("indexed", "resident", "decoded"):
            raise ValueError(
                f"--data.reader {config.reader} needs local shards, and {folder} is a URL; "
                "download them or use --data.reader stream"
            )
        if config.verify == "full" and config.cache_dir is None:
            raise ValueError(
                f"--data.verify full reads every shard as a whole, and {folder} is a URL; give --data.cache-dir, download "
                "the shards or use --data.verify sizes"
            )
        if config.cache_dir is None:
            return cls(folder)
        max_bytes = int(config.cache_gib * 2**30)
        return cls(folder, ShardCache(config.cache_dir.absolute(), max_bytes, recheck=config.verify == "full"))

    @property
    def description(self) -> str:
        """Where the shards come from."""
        if not self.cache:
            return self.folder
        return f"{self.folder} through {self.cache.folder} (up to {self.cache.max_bytes / 2**30:,.3g} GiB)"

    def shard_set(self) -> ShardSet:
        """The manifest and index, of which nothing is left on disk.

        Raises FileNotFoundError when they cannot be fetched and ValueError when they are not valid.
        """
        if remote_folder(self.folder) is None:
            return ShardSet.open(self.folder)
        with tempfile.TemporaryDirectory() as copy:
            path = Path(copy) / MANIFEST_NAME
            path.write_bytes(_fetch(self.folder, MANIFEST_NAME, MAX_MANIFEST_BYTES))
            try:
                num_images = sum(split.num_images for split in Manifest.read(path).splits.values())
                row_bytes = sum(np.dtype(column).itemsize for column in INDEX_TYPES.values())
                index = _fetch(self.folder, INDEX_NAME, INDEX_HEADER_BYTES + num_images * row_bytes)
                (Path(copy) / INDEX_NAME).write_bytes(index)
                shard_set = ShardSet.open(copy)
                shard_set.index(next(iter(shard_set.manifest.splits)))  # reads them all, while they are there
                if any(shard.url for split in shard_set.manifest.splits.values() for shard in split.shards):
                    raise ValueError(
                        f"{self.folder} points at shards elsewhere; copy its two files to a folder, and name that"
                    )
            except ValueError as error:
                raise ValueError(str(error).replace(f"{copy}/", self.folder)) from error
        return shard_set

    def prepare(self, split: Split) -> None:
        """Make the cache ready for the shards of a split; raises ValueError when one of them is too large for it."""
        if self.cache:
            self.cache.check_fits(split.shards)
            self.cache.prepare()

    def open(self, shard: Shard, start: int, stop: int) -> io.BufferedReader:
        """Open a shard to read bytes `start` to `stop` of it, or more, in sequence.

        Opening and reading raise ValueError without saying which shard it is.
        """
        if self.cache:
            return self.cache.open(shard, lambda resumed_at: self._file(shard, resumed_at, shard.num_bytes))
        return io.BufferedReader(self._file(shard, start, stop), READ_BYTES)

    def _file(self, shard: Shard, start: int, stop: int) -> RemoteFile:
        return RemoteFile(
            shard.url or self.folder + shard.name,
            start=start,
            stop=stop,
            num_bytes=shard.num_bytes,
            persistence=self.persistence,
        )


def is_remote(location: str) -> bool:
    """Whether the shards of a set lie behind URLs: the set itself, or what it points at.

    Raises FileNotFoundError and ValueError for a path without a shard set.
    """
    return remote_folder(location) is not None or ShardSet.open(location).is_remote


def open_shard_set(config: DataConfig, location: str) -> tuple[ShardSet, RemoteShards | None]:
    """A shard set as `config` reads it, and where its shards are unless they are local."""
    remote = RemoteShards.of(config, location)
    shard_set = remote.shard_set() if remote else ShardSet.open(location)
    return shard_set.resized_to(config.resized_to), remote


def _fetch(folder: str, name: str, max_bytes: int) -> bytes:
    late = time.monotonic() + LISTING_S
    try:
        with RemoteFile(folder + name) as file:
            content = bytearray()
            while chunk := file.read(READ_BYTES):
                content += chunk
                if len(content) > max_bytes:
                    raise ValueError(f"it is longer than {max_bytes:,} bytes")
                if time.monotonic() > late:
                    raise ValueError(
                        f"{len(content):,} bytes of it came in {LISTING_S:,.0f} s; copy the shards to a folder"
                    )
    except ValueError as error:
        raise FileNotFoundError(f"no shard set at {folder}: {name}: {error}") from error
    return bytes(content)
