"""A folder of shards copied from elsewhere, shared by any number of processes and bounded in size, without importing torch.

    FOLDER/SHA256.tar             a whole shard, under the checksum that it was found to have
    FOLDER/SHA256.NUM_BYTES.part  one that is on its way, locked (flock) by the process that fetches it
    FOLDER/.lock                  held, for milliseconds, by who looks for a shard, makes room or gives a shard its name

The kernel lets go of a dead process's locks. What it had fetched is taken up by the next process that wants that shard, or
makes room for another. A shard on its way counts in full. One that makes room while it is still being read is not broken:
its reader has it open; until then its space is taken.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from io import BufferedReader, FileIO, RawIOBase
from pathlib import Path
from typing import BinaryIO

from vaetrain.data.format.manifest import Shard
from vaetrain.data.format.tar_index import sha256_of_headers
from vaetrain.files import READ_BYTES, readable_disk_errors

# More than the 15 s after which a process gives a download up, and so lets go of it.
STUCK_S = 20.0
POLL_S = 0.02


@dataclass(frozen=True)
class ShardCache:
    """Shards of a remote folder that were read lately; picklable."""

    folder: Path
    """Where they lie; it is made if need be."""

    max_bytes: int
    """Size of all files in it, at most, at any time."""

    recheck: bool = False
    """Whether to take the checksum of a shard each time it is opened, and not only when it arrives."""

    def check_fits(self, shards: tuple[Shard, ...]) -> None:
        """Raise ValueError when one of the shards alone is too large."""
        largest = max(shards, key=lambda shard: shard.num_bytes)
        if largest.num_bytes > self.max_bytes:
            raise ValueError(
                f"--data.cache-gib {self.max_bytes / 2**30:g} is {self.max_bytes:,} bytes, and {largest.name} alone has "
                f"{largest.num_bytes:,}; give more, or leave out --data.cache-dir"
            )

    def prepare(self) -> None:
        """Make the folder, and evict what exceeds the bound, which may have been larger before."""
        with readable_disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._make_room(0)

    def open(self, shard: Shard, read_from: Callable[[int], RawIOBase]) -> BufferedReader:
        """Open a shard, which is fetched first unless it is here; `read_from` opens the original at some byte.

        Waits while another process fetches it, or while what others fetch leaves no room. Raises ValueError when what
        arrives is not the shard, when the folder cannot be written, and when nothing moves for STUCK_S; and what reading
        the original raises.
        """
        seen, seen_at = "", time.monotonic()
        with readable_disk_errors(self.folder):
            while True:
                with self._locked():
                    whole = self._open_whole(shard)
                    part = None if whole else self._claim(shard)
                    state = "" if whole or part else self._state()
                if whole and not (self.recheck and self._drop_if_changed(whole, shard)):
                    return whole
                if part:
                    with part:
                        self._fill(part, shard, read_from)
                        with self._locked():
                            _part(self.folder, shard).replace(_whole(self.folder, shard))
                            return BufferedReader(FileIO(_whole(self.folder, shard)), READ_BYTES)
                if state != seen:
                    seen, seen_at = state, time.monotonic()
                self._check_patience(seen_at)

    def _open_whole(self, shard: Shard) -> BufferedReader | None:
        path = _whole(self.folder, shard)
        if not path.exists():
            return None
        if path.stat().st_size != shard.num_bytes:
            path.unlink()
            return None
        os.utime(path)
        return BufferedReader(FileIO(path), READ_BYTES)

    def _drop_if_changed(self, file: BufferedReader, shard: Shard) -> bool:
        if shard.url:
            changed = sha256_of_headers(_whole(self.folder, shard)) != shard.sha256
        else:
            changed = hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256
        file.seek(0)
        if changed:
            file.close()
            with self._locked():
                _whole(self.folder, shard).unlink(missing_ok=True)
        return changed

    def _claim(self, shard: Shard) -> BinaryIO | None:
        """The shard's unfinished file, locked, with room for all of it; None: another process has it, or the room."""
        path = _part(self.folder, shard)
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        if _try_lock(file):
            if self._make_room(shard.num_bytes, besides=path):
                return file
            if path.stat().st_size == 0:
                path.unlink()
        file.close()
        return None

    def _fill(self, part: BinaryIO, shard: Shard, read_from: Callable[[int], RawIOBase]) -> None:
        """Complete a claimed file and check it; what has arrived when reading breaks off is left for the next attempt."""
        digest = hashlib.sha256()
        while chunk := part.read(READ_BYTES):
            digest.update(chunk)
        resumed_at = part.tell()
        with closing(read_from(resumed_at)) as original:
            while chunk := original.read(READ_BYTES):
                part.write(chunk)
                digest.update(chunk)
        if shard.url:
            part.flush()
            _check_headers(part, _part(self.folder, shard), shard)
        elif digest.hexdigest() != shard.sha256:
            part.seek(0)
            part.truncate()
            if not resumed_at:
                raise ValueError(f"its SHA-256 is {digest.hexdigest()}, not the manifest's {shard.sha256}")
            self._fill(part, shard, read_from)  # the fault may lie in what there was
        part.flush()
        os.fsync(part.fileno())

    def _make_room(self, num_bytes: int, besides: Path | None = None) -> bool:
        """Evict what was not used for longest until so many bytes fit; False: others fetch too much at this moment."""
        files = [file for file in self._files() if file.path != besides]
        excess = sum(file.num_bytes for file in files) + num_bytes - self.max_bytes
        if excess <= 0:
            return True
        idle = sorted((file for file in files if not file.is_on_its_way()), key=lambda file: file.used_ns)
        if sum(file.num_bytes for file in idle) < excess:
            return False
        for file in idle:
            if excess > 0:
                file.path.unlink()
                excess -= file.num_bytes
        return True

    def _files(self) -> Iterator[_CachedFile]:
        # Whatever else lies in the folder is not ours.
        for entry in os.scandir(self.folder):
            if named := re.fullmatch(r"[0-9a-f]{64}\.(?:(\d+)\.part|tar)", entry.name):
                status = entry.stat()
                yield _CachedFile(Path(entry.path), int(named[1] or status.st_size), status.st_mtime_ns)

    def _state(self) -> str:
        return "\n".join(
            sorted(f"{file.path.name} {file.path.stat().st_size} {file.used_ns}" for file in self._files())
        )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / ".lock").open("wb") as lock:
            began = time.monotonic()
            while not _try_lock(lock):
                self._check_patience(began)
            yield

    def _check_patience(self, since: float) -> None:
        if time.monotonic() - since > STUCK_S:
            raise ValueError(
                f"other processes have held {self.folder} for {STUCK_S:g} s without moving; end them, or give another "
                "--data.cache-dir"
            )
        time.sleep(POLL_S)


@dataclass(frozen=True)
class _CachedFile:
    path: Path
    num_bytes: int
    """In the end, for one that is on its way."""
    used_ns: int

    def is_on_its_way(self) -> bool:
        if self.path.suffix != ".part":
            return False
        with self.path.open("rb") as file:
            return not _try_lock(file)


def _check_headers(part: BinaryIO, path: Path, shard: Shard) -> None:
    """Empty a file that does not hold what the shard held when it was indexed; raises ValueError, which says so."""
    try:
        found = sha256_of_headers(path)
    except ValueError as error:
        found = str(error)
    if found != shard.sha256:
        part.seek(0)
        part.truncate()
        raise ValueError(f"it holds other files than when it was indexed ({found}); run tools/index_shards.py again")


def _try_lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _whole(folder: Path, shard: Shard) -> Path:
    return folder / f"{shard.sha256}.tar"


def _part(folder: Path, shard: Shard) -> Path:
    return folder / f"{shard.sha256}.{shard.num_bytes}.part"
