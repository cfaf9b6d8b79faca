"""A remote folder of shards, whose files are read in sequence whatever the line does, without importing torch.

https://HOST/FOLDER/     urllib, with ranges where the server knows them
s3:// gs:// hf:// …      fsspec and the package that it has for the scheme
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vaetrain.data.config import DataConfig
from vaetrain.data.format.index import INDEX_TYPES
from vaetrain.data.format.manifest import INDEX_NAME, MANIFEST_NAME, Manifest, Shard, Split
from vaetrain.data.format.shard_set import ShardSet
from vaetrain.data.remote.cache import ShardCache
from vaetrain.data.remote.connection import PROGRESS_BYTES, BrokenOffError, Connection, connect
from vaetrain.data.remote.url import remote_folder
from vaetrain.files import READ_BYTES

MAX_MANIFEST_BYTES = 1 << 28  # about a million shards
INDEX_HEADER_BYTES = 1 << 20


@dataclass(frozen=True)
class Persistence:
    """When a file is given up: well within the 30 s in which a run that cannot go on must stop."""

    give_up_s: float = 15.0
    """Seconds, over all attempts, in which 64 KiB must come."""

    attempts: int = 8
    """Connections in a row that bring the file no further (by 64 KiB)."""

    first_wait_s: float = 0.25
    """Seconds between the first two attempts; doubled after each."""

    longest_wait_s: float = 4.0
    """Seconds between attempts, at most."""


class RemoteFile(io.RawIOBase):
    """A file of a remote folder from byte `start` to `stop` (None: its end), connected to anew where the line breaks.

    `num_bytes` is the size it should have. Reading raises ValueError saying why the file is given up; the caller says which
    file it is. Seeking forward reads over up to a mebibyte and asks for a new range beyond.
    """

    def __init__(
        self,
        folder: str,
        name: str,
        *,
        start: int = 0,
        stop: int | None = None,
        num_bytes: int | None = None,
        persistence: Persistence = Persistence(),
    ) -> None:
        self._folder, self._name, self._persistence = folder, name, persistence
        self._position, self._stop, self._num_bytes = start, stop, num_bytes
        self._connection: Connection | None = None
        self._furthest = start
        self._failures: list[str] = []  # since the file came any further
        self._received, self._waited_s = 0, 0.0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes, and best forward."""
        return True

    def tell(self) -> int:
        """Position in the file."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte counted from the file's start, or from here."""
        assert whence in (io.SEEK_SET, io.SEEK_CUR), "a remote file is not read from its end"
        self._position = offset + (self._position if whence == io.SEEK_CUR else 0)
        self._furthest, self._failures = self._position, []
        connection = self._connection
        if connection and not 0 <= self._position - connection.at <= (
            READ_BYTES if connection.seekable else sys.maxsize
        ):
            self._disconnect()
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill some of a buffer; 0 at `stop`, and where the file ends without one."""
        view = memoryview(buffer).cast("B")
        if self._stop is not None:
            view = view[: max(0, self._stop - self._position)]
        if not view:
            return 0
        while True:
            try:
                return self._receive(view)
            except BrokenOffError as error:
                self._disconnect()
                self._back_off(error)

    def close(self) -> None:
        """Give the connection up."""
        self._disconnect()
        super().close()

    def _receive(self, view: memoryview) -> int:
        if self._connection is None:
            left = self._persistence.give_up_s - self._waited_s
            with self._timed():
                self._connection = connect(self._folder, self._name, self._position, self._stop, left)
            found, expected = self._connection.num_bytes, self._num_bytes
            if found is not None and expected is not None and found != expected:
                raise ValueError(f"the file there has {found:,} bytes, not {expected:,}")
        connection, received = self._connection, 0
        while connection.at < self._position:
            before = memoryview(bytearray(min(READ_BYTES, self._position - connection.at)))
            if not self._receive_from(connection, before):
                raise ValueError(f"the file there ends at byte {connection.at:,}")
        received = self._receive_from(connection, view)
        if not received and self._stop is not None:
            raise ValueError(f"the file there ends at byte {self._position:,}")
        self._position += received
        if self._position - self._furthest >= PROGRESS_BYTES:
            self._furthest, self._failures = self._position, []
        return received

    def _receive_from(self, connection: Connection, view: memoryview) -> int:
        with self._timed():
            received = connection.receive(view)
        self._received += received
        if self._received >= PROGRESS_BYTES:
            self._received, self._waited_s = 0, 0.0
        return received

    def _back_off(self, error: BrokenOffError) -> None:
        persistence = self._persistence
        wait = min(persistence.longest_wait_s, persistence.first_wait_s * 2 ** len(self._failures))
        self._failures.append(str(error))
        if len(self._failures) >= persistence.attempts or self._waited_s + wait >= persistence.give_up_s:
            causes = ", then ".join(dict.fromkeys(self._failures))
            raise ValueError(f"{causes} (given up after {len(self._failures)} attempt(s))") from error
        print(f"{self._name}: {error}; trying again in {wait:g} s", file=sys.stderr, flush=True)
        with self._timed():
            time.sleep(wait)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Counts what is spent waiting, and not the time in which nobody reads."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._waited_s += time.monotonic() - began

    def _disconnect(self) -> None:
        if self._connection:
            self._connection.close()
            self._connection = None


@dataclass(frozen=True)
class RemoteShards:
    """The shards behind a URL, with or without a cache on this node; picklable."""

    folder: str
    """URL with its trailing slash."""

    cache: ShardCache | None = None
    """None: nothing is kept."""

    persistence: Persistence = Persistence()
    """When a shard is given up."""

    @classmethod
    def of(cls, config: DataConfig, location: str) -> RemoteShards | None:
        """What a location names, read the way the configuration says; None: a path.

        Raises ValueError for what is asked and only local shards can do.
        """
        folder = remote_folder(location)
        if folder is None:
            return None
        if config.reader in ("indexed", "resident"):
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
            self.folder, shard.name, start=start, stop=stop, num_bytes=shard.num_bytes, persistence=self.persistence
        )


def _fetch(folder: str, name: str, max_bytes: int) -> bytes:
    try:
        with RemoteFile(folder, name) as file:
            content = bytearray()
            while chunk := file.read(READ_BYTES):
                content += chunk
                if len(content) > max_bytes:
                    raise ValueError(f"it is longer than {max_bytes:,} bytes")
    except ValueError as error:
        raise FileNotFoundError(f"no shard set at {folder}: {name}: {error}") from error
    return bytes(content)
