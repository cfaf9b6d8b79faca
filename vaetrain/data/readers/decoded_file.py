"""The decoded images of a split in a file on this node's disk, which all its processes map, without importing torch.

    FOLDER/KEY.pixels        uint8 (n, h, w, c) and a byte an image, all 1: whole, for all later runs
    FOLDER/KEY.BOOT.part     the same, on its way: the byte of an image that is there is 1
    FOLDER/.lock             held, for milliseconds, by who opens a file, makes room or gives one its name

KEY stands for the data's fingerprint, the split, the images kept and what is done to them. Whoever decodes an image writes it.
A process that is killed loses nothing, for what it wrote lies in the kernel's cache; a machine that loses power may lose some of
it in any order, so what it had begun (BOOT) is begun anew. A file that some process uses is locked (flock) and makes no room.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import mmap
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from vaetrain.data.config import DataConfig
from vaetrain.data.readers.selection import Selection
from vaetrain.files import readable_disk_errors
from vaetrain.machine import process_space

STUCK_S = 60.0
"""For so long others may hold the folder's lock: to reserve space takes seconds on some file systems."""
NAMED = re.compile(r"[0-9a-f]{32}\.(pixels|[0-9a-f]{8}\.part)")


def decoded_folder(config: DataConfig) -> Path:
    """Where such files lie."""
    return config.decoded_dir or Path(tempfile.gettempdir()) / f"vaetrain-decoded-{os.getuid()}"


def no_room(config: DataConfig, selection: Selection) -> str | None:
    """Why a split is not kept decoded on disk; None: it can be, or is already."""
    num_bytes, folder = file_bytes(selection), decoded_folder(config)
    if num_bytes > config.decoded_gib * 2**30:
        return f"over --data.decoded-gib {config.decoded_gib:g}"
    if any(folder.glob(f"{key_of(selection)}.*")):
        return None
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    if num_bytes > shutil.disk_usage(there).free:
        return f"more than is free in {folder}"
    return None


def file_bytes(selection: Selection) -> int:
    """Size of the file."""
    return selection.decoded_bytes + selection.num_images


def key_of(selection: Selection) -> str:
    """Stands for the pixels of a selection."""
    digest = hashlib.sha256(f"{selection.shard_set.manifest.fingerprint} {selection.split}".encode())
    digest.update(selection.index.shard.tobytes() + selection.index.within_shard.tobytes())
    return digest.hexdigest()[:32]


class DecodedFile:
    """The file of a selection, opened, or made where there is none.

    Raises ValueError where there is no room for it or it cannot be written. Attributes: `pixels`, to be read and written where
    `is_there` is 0; `is_there`, one byte an image; `is_whole`.
    """

    def __init__(self, selection: Selection, folder: Path, max_bytes: int) -> None:
        self.is_whole = False
        self._folder, self._max_bytes, self._num_bytes = folder, max_bytes, file_bytes(selection)
        key, boot = key_of(selection), hashlib.sha256((process_space() or "").encode()).hexdigest()[:8]
        self.path, self._part = folder / f"{key}.pixels", folder / f"{key}.{boot}.part"
        with readable_disk_errors(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = folder.lstat()
            if status.st_uid != os.getuid() or folder.is_symlink():
                raise ValueError(
                    f"{folder} is another user's, or a link; give a folder of your own with --data.decoded-dir"
                )
            with self._locked():
                self._file = self._open()
                fcntl.flock(self._file, fcntl.LOCK_SH)
        self._map = mmap.mmap(self._file, self._num_bytes)
        shape = (selection.num_images, *selection.image_shape)
        self.pixels: UInt8[np.ndarray, "n h w c"] = np.ndarray(shape, np.uint8, self._map)
        self.is_there: UInt8[np.ndarray, " n"] = np.ndarray(shape[:1], np.uint8, self._map, math.prod(shape))

    def finish(self) -> None:
        """Give the file its name once all images are there; whichever process is first does it."""
        if self.is_whole or not self.is_there.all():
            return
        with readable_disk_errors(self.path):
            self._map.flush()
            os.fsync(self._file)
            with self._locked():
                if self._part.exists():
                    self._part.replace(self.path)
        self.is_whole = True

    def close(self) -> None:
        """Let go of the file; the arrays stay as long as somebody holds them."""
        fcntl.flock(self._file, fcntl.LOCK_UN)  # the map has a descriptor of its own, which would keep the lock
        os.close(self._file)

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self.is_whole = self.path.exists() and self.path.stat().st_size == self._num_bytes
        if self.is_whole:
            os.utime(self.path)
            return os.open(self.path, flags & ~os.O_CREAT)
        is_new = not self._part.exists() or self._part.stat().st_size != self._num_bytes
        if is_new:
            self._make_room()
        file = os.open(self._part, flags, 0o600)
        if is_new:
            try:
                # A hole in the file that finds the disk full later ends the process with SIGBUS.
                os.posix_fallocate(file, 0, self._num_bytes)
            except BaseException:
                os.close(file)
                self._part.unlink()
                raise
        return file

    def _make_room(self) -> None:
        """Delete what other boots left unfinished and, of the rest, what was not used for longest and nobody uses."""
        if self._num_bytes > self._max_bytes:
            raise ValueError(
                f"decoded, the split takes {self._num_bytes / 2**30:.2f} GiB, and --data.decoded-gib is "
                f"{self._max_bytes / 2**30:g}; give more, or use --data.reader indexed"
            )
        files = sorted(
            (path for path in self._folder.iterdir() if NAMED.fullmatch(path.name)),
            key=lambda path: (path.suffix == ".pixels", path.stat().st_mtime_ns),
        )
        total = sum(path.stat().st_size for path in files) + self._num_bytes
        for path in files:
            is_left = path.suffix == ".part" and path.name.split(".")[1] != self._part.name.split(".")[1]
            if (is_left or total > self._max_bytes) and not _is_used(path):
                total -= path.stat().st_size
                path.unlink()
        if total > self._max_bytes:
            raise ValueError(
                f"{self._folder} has no room for {self._num_bytes / 2**30:.2f} GiB within --data.decoded-gib "
                f"{self._max_bytes / 2**30:g} while other runs use theirs; give more, or another --data.decoded-dir"
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._folder / ".lock").open("wb") as lock:
            began = time.monotonic()
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() - began > STUCK_S:
                        raise ValueError(
                            f"other processes have held {self._folder} for {STUCK_S:g} s; end them, or give another "
                            "--data.decoded-dir"
                        ) from error
                    time.sleep(0.02)
            yield


def _is_used(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
