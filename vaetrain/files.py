"""Files that are whole or absent, and their hashes."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

READ_BYTES = 1 << 20
"""Read at a time, of what is read from front to back."""


class NewerFormatError(ValueError):
    """A file that only a newer vaetrain reads: neither damaged nor readable."""


def replace_file(path: Path, content: bytes) -> None:
    """Write a file aside and rename it into place, so that nobody ever sees half of it."""
    aside = path.with_name(path.name + ".partial")
    with naming_file(path), aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Have what goes wrong while `path` is written (a full disk) name it, as what goes wrong when it is opened does."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def readable_disk_errors(path: Path) -> Iterator[None]:
    """Turn what the file system refuses while `path` is written into a ValueError that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "choose a folder that can be written"
        raise ValueError(f"cannot write {path}: {error.strerror or error}; {remedy}, then run it again") from error


def check_free_space(folder: Path, num_bytes: int, what: str) -> None:
    """Raise ValueError when so many bytes more do not fit."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ValueError(f"{what} needs {num_bytes:,} bytes in {folder}, which has {free:,}; free some space")
